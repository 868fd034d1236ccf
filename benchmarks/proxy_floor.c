/* The floor of benchmarks/proxy_cost.py: an epoll loop that relays bytes both ways and understands nothing.
 * Try: gcc -O2 -o floor proxy_floor.c && ./floor 9000 8200
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_DESCRIPTORS = 65536, BUFFER_BYTES = 65536 };
static int other[MAX_DESCRIPTORS];

static struct sockaddr_in loopback(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static void watch(int epoll, int descriptor) {
    int on = 1;
    struct epoll_event event = {.events = EPOLLIN, .data.fd = descriptor};
    setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    epoll_ctl(epoll, EPOLL_CTL_ADD, descriptor, &event);
}

static void hang_up(int descriptor) {
    int peer = other[descriptor];
    other[descriptor] = -1;
    close(descriptor);
    if (peer >= 0) {
        other[peer] = -1;
        close(peer);
    }
}

static void relay(int from) {
    static char buffer[BUFFER_BYTES];
    ssize_t got = recv(from, buffer, sizeof buffer, 0);
    if (got <= 0) {
        hang_up(from);
        return;
    }
    for (ssize_t sent = 0; sent < got;) {
        ssize_t n = send(other[from], buffer + sent, got - sent, MSG_NOSIGNAL);
        if (n < 0) {
            hang_up(from);
            return;
        }
        sent += n;
    }
}

int main(int count, char **arguments) {
    if (count != 3) {
        fprintf(stderr, "usage: %s LISTEN_PORT SERVER_PORT\n", arguments[0]);
        return 2;
    }
    struct sockaddr_in here = loopback(atoi(arguments[1])), server = loopback(atoi(arguments[2]));
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0), epoll = epoll_create1(0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 4096)) {
        perror("listen");
        return 1;
    }
    watch(epoll, listener);
    for (;;) {
        struct epoll_event events[512];
        int ready = epoll_wait(epoll, events, 512, -1);
        for (int i = 0; i < ready; i++) {
            int descriptor = events[i].data.fd;
            if (descriptor != listener) {
                if (other[descriptor] >= 0) relay(descriptor);
                continue;
            }
            int client = accept(listener, NULL, NULL), upstream = socket(AF_INET, SOCK_STREAM, 0);
            if (client < 0 || upstream < 0 || connect(upstream, (struct sockaddr *)&server, sizeof server)) {
                perror("accept or connect");
                return 1;
            }
            other[client] = upstream;
            other[upstream] = client;
            watch(epoll, client);
            watch(epoll, upstream);
        }
    }
}
