"""vLLM's own scheduler, which also logs when each prompt arrived, waited and was computed: `--scheduler-cls pdbench.kv.prompt_log.scheduler`.

It decides nothing: every method calls vLLM's and looks at what went in and came out. vLLM 0.10.2 and newer.
"""

from __future__ import annotations

import os
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdbench.events import PromptEvent
from pdbench.kv.event_log import EventLog

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

LOG_VARIABLE = "PDBENCH_PROMPT_LOG"
"""The file that gets the events; without it vLLM's scheduler stays as it is. The file's name up to its first dot names the server."""


class PromptLog:
    """The prompts of one scheduler that have no first token yet; each is one event when it has, or when it ends without."""

    def __init__(self, path: str) -> None:
        self._log = EventLog(path)
        self._server = Path(path).name.split(".")[0]
        self._open: dict[str, tuple[Request, PromptEvent]] = {}
        self._step_end_s = 0.0
        self._launched_s: dict[
            int, float
        ] = {}  # by the step's output, of steps with a prompt; until then when it was scheduled

    def added(self, request: Request) -> None:
        """The engine took the request from its input, which it looks into between two steps."""
        now_s, arrival = time.monotonic(), getattr(request, "arrival_time", None)
        # The API server's wall clock, when it had the request's tokens.
        waited_s = max(time.time() - arrival, 0.0) if arrival else 0.0
        parameters = getattr(request, "kv_transfer_params", None) or {}
        event = PromptEvent(
            server=self._server,
            request_id=request.request_id,
            transfer_id=parameters.get("transfer_id"),
            prompt_tokens=int(request.num_prompt_tokens),
            arrived_s=now_s - waited_s,
            taken_s=now_s,
        )
        self._open.setdefault(request.request_id, (request, event))

    def scheduled(self, output: SchedulerOutput) -> None:
        """A step was scheduled; with asynchronous scheduling the one before may still run."""
        if not self._open:
            return
        now_s = time.monotonic()
        for name, tokens in output.num_scheduled_tokens.items():
            if name in self._open:
                event = self._open[name][1]
                event.begin_s.append(now_s)
                # vLLM may fill a prompt's last step up with drafts, to the size of steps that generate.
                event.tokens.append(tokens - len(output.scheduled_spec_decode_tokens.get(name, ())))
                self._launched_s[id(output)] = now_s

    def launched(self, output: SchedulerOutput) -> None:
        """The host has handed the step to the GPU, or to the processes that drive it."""
        if id(output) in self._launched_s:
            self._launched_s[id(output)] = time.monotonic()

    def computed(self, output: SchedulerOutput, at_s: float) -> None:
        """The output of a step arrived at `at_s`, and vLLM has added its tokens to the requests."""
        before_s, self._step_end_s = self._step_end_s, at_s
        launched_s = self._launched_s.pop(id(output), None)
        if launched_s is None:  # a step without a prompt
            return
        for name in output.num_scheduled_tokens:
            if name not in self._open:
                continue
            request, event = self._open[name]
            step = len(event.end_s)
            if step < len(event.begin_s):
                # With asynchronous scheduling the one before may still have run, and its output is read only once this one is
                # launched, which takes the host as long as the GPU for a prompt of eager kernels: waiting is what came after.
                waited_s = max(before_s - launched_s, 0.0)
                event.begin_s[step] = max([event.begin_s[step] + waited_s, *event.end_s[-1:]])
                event.end_s.append(at_s)
            if request.num_output_tokens > 0:
                event.first_token_s = at_s
                self._close(name, event)

    def freed(self, request: Request) -> None:
        """The request is over; one that got its first token in this step is logged by `computed`."""
        entry = self._open.get(request.request_id)
        if entry is not None and request.num_output_tokens == 0:
            entry[1].error = request.status.name.removeprefix("FINISHED_").lower()
            self._close(request.request_id, entry[1])

    def close(self) -> None:
        self._log.close()

    def _close(self, name: str, event: PromptEvent) -> None:
        del self._open[name]
        steps = len(event.end_s)
        del event.begin_s[steps:], event.tokens[steps:]  # scheduled ahead: no part of the prompt
        self._log.add(event)


def scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """What vLLM constructs: its scheduler for this configuration, with a log if `LOG_VARIABLE` names one."""
    asynchronous = getattr(vllm_config.scheduler_config, "async_scheduling", False)
    module, name = ("async_scheduler", "AsyncScheduler") if asynchronous else ("scheduler", "Scheduler")
    if getattr(vllm_config, "diffusion_config", None) is not None:
        module, name = "diffusion_scheduler", f"Diffusion{name}"
    # Imported here: vLLM resolves this function's name before its platform is known.
    base: type = getattr(import_module(f"vllm.v1.core.sched.{module}"), name)
    path = os.environ.get(LOG_VARIABLE)
    if path:
        limits, switch = vllm_config.scheduler_config, "enabled" if asynchronous else "disabled"
        # vLLM says neither in its own log where it is a default (server_metrics reads the line).
        print(f"max_num_seqs={limits.max_num_seqs}, Asynchronous scheduling is {switch}", flush=True)
        base = type(f"Logged{base.__name__}", (_Logged, base), {"prompt_log": PromptLog(path)})
    return base(vllm_config, *args, **kwargs)


class _Logged:
    """In front of vLLM's scheduler class. Signatures are left open because they differ between versions."""

    prompt_log: PromptLog

    def add_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.prompt_log.added(request)
        return super().add_request(request, *args, **kwargs)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.prompt_log.scheduled(output)
        return output

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        # The engine's call between a step's launch and its sampling, with and without a grammar.
        self.prompt_log.launched(scheduler_output)
        return super().get_grammar_bitmask(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        at_s = time.monotonic()
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        self.prompt_log.computed(scheduler_output, at_s)
        return outputs

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        self.prompt_log.freed(request)
        return freed

    def shutdown(self, *args: Any, **kwargs: Any) -> Any:
        self.prompt_log.close()
        return super().shutdown(*args, **kwargs)  # type: ignore[misc]
