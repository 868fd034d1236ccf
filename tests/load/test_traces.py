"""Trace formats and their units, odd files that are read all the same, and those that are refused with the row and the remedy."""

import gzip
import json
import shutil
from dataclasses import replace

import pytest

from pdbench.config import LoadConfig
from pdbench.errors import UserError, span
from pdbench.load import plan
from pdbench.load.input_files import read_duration
from pdbench.load.traces import Trace, read_trace
from tests.load.test_generator import load
from tests.support.servers import ScriptedServer, stream, tokens

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BAILIAN = {"chat_id": 159, "parent_chat_id": -1, "type": "text", "turn": 1}


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def mooncake(at, length=374, output=44, **more) -> dict:
    return {"timestamp": at, "input_length": length, "output_length": output, **more}


def ids(count: int) -> list[int]:
    return list(range(count))


TRACES = {
    "azure2023.csv": AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
    "azure2024.csv": AZURE + "2024-05-10 00:00:00.009930+00:00,374,44\n2024-05-10 00:00:04.324509+00:00,396,109\n",
    "burstgpt.csv": BURSTGPT
    + "5,ChatGPT,374,44,418,Conversation log\n7,GPT-4,10,0,10,API log\n9.314579,GPT-4,396,109,505,API log\n",
    "mooncake.jsonl": lines(mooncake(27000, hash_ids=[1]), mooncake(31314.579, 396, 109, hash_ids=[1])),
    "own.jsonl": lines(
        {"arrival_s": 4.314579, "input_tokens": 396, "output_tokens": 109},
        {"arrival_s": 0, "input_tokens": 374, "output_tokens": 44},
    ),
    "bailian.jsonl": lines(
        BAILIAN | mooncake(61.114, hash_ids=ids(24)), BAILIAN | mooncake(65.428579, 396, 109, hash_ids=ids(25))
    ),
    "weka.json": json.dumps(
        {
            "id": "a",
            "block_size": 64,
            "hash_id_scope": "local",
            "requests": [
                {"t": 0.0, "type": "n", "model": "m", "in": 374, "out": 44, "hash_ids": ids(6), "api_time": 1.5},
                {
                    "t": 4.0,
                    "type": "subagent",
                    "requests": [{"t": 4.314579, "in": 396, "out": 109, "hash_ids": ids(7)}],
                },
            ],
        }
    ),
    "microseconds.jsonl": lines(
        *(
            {"arrival_us": at, "prompt_tokens": i, "completion_tokens": o}
            for at, i, o in ((7, 374, 44), (4314586, 396, 109))
        )
    ),
    "epoch_ns.jsonl": lines(mooncake("1753780607550317897"), mooncake("1753780611864896897", 396, 109)),
    "epoch_ms.csv": "timestamp;input_length;output_length\n1753780607550;374;44\n1753780611864,579;396;109\n",
    "iso.jsonl": lines(mooncake("2024-05-10T00:00:00Z"), mooncake("2024-05-10T02:00:04.314579+02:00", 396, 109)),
    "array.json": json.dumps([mooncake(0), mooncake(4314.579, 396.0, "109")], indent=1),
    "vidur.csv": "arrived_at,num_prefill_tokens,num_decode_tokens\n0,374,44\n4.314579,396,109\n",
    "tabs.tsv": "TIMESTAMP\tContextTokens\tGeneratedTokens\n0\t374\t44\n4.314579\t396\t109\n",
    "quoted.csv": '"Timestamp","Request tokens","Response tokens"\n"5","374","44"\n\n"9.314579","396.0","109"\n,,\n',
    "turns.jsonl": lines(
        mooncake(27000, session_id="s"),
        {"session_id": "s", "delay": 4314.579, "input_length": 396, "output_length": 109},
    ),
    # The unit of these times is known when all of them are read.
    "turns_epoch_ms.jsonl": lines(
        {"session_id": "s", "timestamp": 1753780607550, "input_tokens": 374, "output_tokens": 44},
        {"session_id": "s", "delay": 4314.579, "input_tokens": 396, "output_tokens": 109},
    ),
    "turns_epoch_s.jsonl": lines(
        mooncake(1753780607, session_id="s"),
        {"session_id": "s", "delay": 4314.579, "input_length": 396, "output_length": 109},
    ),
}


@pytest.mark.parametrize("name", TRACES)
def test_every_trace_format_is_read_in_its_unit(tmp_path, name):
    (tmp_path / name).write_text(TRACES[name])
    rows = read_trace(tmp_path / name).rows
    assert [(row.input_tokens, row.output_tokens) for row in rows] == [(374, 44), (396, 109)]
    assert [row.arrival_s for row in rows] == pytest.approx([0.0, 4.314579], abs=2e-6)


@pytest.mark.parametrize("name", ["azure2023.csv", "burstgpt.csv", "mooncake.jsonl", "own.jsonl", "bailian.jsonl"])
def test_every_trace_format_is_replayed(tmp_path, tokenizer, tokenizer_folder, name):
    (tmp_path / name).write_text(TRACES[name])
    with ScriptedServer(stream(tokens(3))) as server:
        result = load(server, trace=str(tmp_path / name), time_scale=0.05, warmup=0, tokenizer=tokenizer_folder)
        sent = [(tokenizer.count(peer.json["prompt"]), peer.json["max_tokens"]) for peer in server.requests]
    assert sorted(sent) == [(374, 44), (396, 109)]
    first, second = result.requests
    assert second.planned_s - first.planned_s == pytest.approx(4.314579 * 0.05, abs=1e-6)
    assert first.sent_s >= first.planned_s and second.sent_s >= second.planned_s


@pytest.mark.parametrize("change", ["bom", "utf-16", "crlf", "gz", "zst"])
def test_encodings_and_packed_files_are_read(tmp_path, change):
    data = TRACES["azure2023.csv"].encode()
    path = tmp_path / "t.csv"
    if change == "bom":
        data = b"\xef\xbb\xbf" + data
    elif change == "utf-16":
        data = data.decode().encode("utf-16")
    elif change == "crlf":
        data = data.replace(b"\n", b"\r\n")
    elif change == "gz":
        data, path = gzip.compress(data), tmp_path / "t.csv.gz"
    else:
        # One raw block: a frame as `zstd` writes it for data that does not compress.
        size = len(data)
        frame = b"\x28\xb5\x2f\xfd\x20" + bytes([size]) + (size << 3 | 1).to_bytes(3, "little")
        data, path = frame + data, tmp_path / "t.csv.zst"
        if not shutil.which("zstd"):
            pytest.importorskip("zstandard")
    path.write_bytes(data)
    assert [row.input_tokens for row in read_trace(path).rows] == [374, 396]


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("azure2023.csv", "yesterday,1,2\n", "row 4: timestamp is 'yesterday': give a number, or a date"),
        ("azure2023.csv", "5,1,2\n", "row 4: .* a number where earlier rows have a date"),
        ("azure2023.csv", "2023-11-16 18:15:51,1,2,3,4\n", "row 4: more values than the 3 columns"),
        ("azure2023.csv", "2023-11-16 18:15:51,1\n", "row 4: generatedtokens is null"),
        ("burstgpt.csv", "9,GPT-4,many,3,4,API log\n", "row 5: request_tokens is 'many': give a whole number"),
        ("burstgpt.csv", "9\n", "row 5: request_tokens is null"),
        ("mooncake.jsonl", '{"timestamp": 1}\n', r"row 3: no input_tokens \(input_length, .*known are Azure"),
        ("mooncake.jsonl", '{"timestamp": 1, "input_length": 5}\n', r"row 3: no output_tokens \(output_length"),
        ("mooncake.jsonl", '{"input_length": 5, "output_length": 5}\n', r"row 3: no arrival time \(timestamp"),
        ("mooncake.jsonl", lines(mooncake(None)), r"row 3: no arrival time"),
        ("mooncake.jsonl", '{"timestamp": 1, "text": "x"}\n', r"row 3: no input_tokens .*; texts go to --prompt-file"),
        ("mooncake.jsonl", lines(mooncake(5, hash_ids="7") | {"hash_ids": 7}), "row 3: hash_ids is 7"),
        ("mooncake.jsonl", lines(mooncake(5, None)), "row 3: input_length is null"),
        ("mooncake.jsonl", lines(mooncake(5, True)), "row 3: input_length is True"),
        ("mooncake.jsonl", lines(mooncake(5, 10**12)), "row 3: input_length is 1000000000000"),
        ("own.jsonl", '{"arrival_s": NaN, "input_tokens": 1, "output_tokens": 1}\n', "row 3: arrival_s is nan"),
        ("own.jsonl", '{"arrival_s": 1, "input_tokens": -1, "output_tokens": 1}\n', "row 3: input_tokens is -1"),
        ("own.jsonl", '{"arrival_s": 1, "input_tokens": 1.5, "output_tokens": 1}\n', "row 3: input_tokens is 1.5"),
        (
            "own.jsonl",
            f'{{"arrival_s": {10**400}, "input_tokens": 1, "output_tokens": 1}}\n',
            "row 3: arrival_s is 1000",
        ),
        ("burstgpt.csv", '9,GPT-4,"1,000",3,4,API log\n', "row 5: request_tokens is '1,000': give a whole number"),
        ("own.jsonl", "not json\n", "row 3: no JSON"),
        ("own.jsonl", "[]\n", "row 3: not an object"),
        ("own.jsonl", "\0\n", "row 3: a NUL byte"),
    ],
)
def test_malformed_trace_row_is_named(tmp_path, name, bad, message):
    (tmp_path / name).write_text(TRACES[name] + bad)
    with pytest.raises(UserError, match=message) as error:
        read_trace(tmp_path / name)
    assert str(error.value).startswith(f"--trace {tmp_path / name}, row ") and "Error" not in str(error.value)


def test_packed_trace_that_is_cut_short_is_named(tmp_path):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(AZURE.encode())[:-9])
    with pytest.raises(UserError, match=r"t\.csv\.gz is cut short: copy it"):
        read_trace(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x,y\n1,2\n", "no column with the arrival time .*, none with the prompt length .* in x, y; known are"),
        ("timestamp,input_length\n1,2\n", "no column with the output length"),
        ('"time\n\x1b[31mstamp",b\n1,2\n', r"no column with the arrival time [^\n\x1b]* in time  \[31mstamp, b;"),
        ("", "holds no request: known are"),
        (AZURE, "holds no request"),
        (AZURE + "0,5,0\n", "none of its 1 rows has input and output tokens"),
        ("timestamp,input_tokens,Input_Tokens,output_tokens\n0,10,20,3\n", "two columns are called input_tokens"),
        ("PAR1\x15\x04", "a Parquet file: write it as JSON Lines"),
        ('[{"timestamp": 1,\n "input_length": }]', "row 2: no JSON"),
    ],
)
def test_empty_or_unknown_trace_is_a_user_error(tmp_path, content, message):
    path = tmp_path / ("a.json" if content.startswith("[") else "a.csv")
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_trace(path)
    with pytest.raises(UserError, match="No such file"):
        read_trace(tmp_path / "missing.csv")
    with pytest.raises(UserError, match="directory"):
        read_trace(tmp_path)


def notes(tmp_path, *rows: dict, **options) -> Trace:
    (tmp_path / "t.jsonl").write_text(lines(*rows))
    return read_trace(tmp_path / "t.jsonl", **options)


@pytest.mark.parametrize(
    "instants",
    [
        [61.114, 121.5, 133.25, 160.75],  # seconds where the format has milliseconds
        [0, 1, 2, 3],
        [at // 3 for at in range(30)],
    ],
)
def test_trace_that_would_replay_too_fast_is_refused_unless_its_unit_is_given(tmp_path, instants):
    rows = [mooncake(at) for at in instants]
    with pytest.raises(UserError, match="give --trace-unit s if these are seconds"):
        notes(tmp_path, *rows)
    assert notes(tmp_path, *rows, unit="s").rows[-1].arrival_s == pytest.approx(instants[-1] - instants[0])
    assert notes(tmp_path, *rows, unit="ms").rows[-1].arrival_s == pytest.approx((instants[-1] - instants[0]) / 1e3)


def test_trace_that_would_replay_too_slowly_is_refused_unless_its_unit_is_given(tmp_path):
    rows = [{"arrival_s": 1000 * at, "input_tokens": 1, "output_tokens": 1} for at in range(5)]
    with pytest.raises(UserError, match=r"typically come 17 min after the one before.*give --trace-unit"):
        notes(tmp_path, *rows)
    assert notes(tmp_path, *rows, unit="ms").rows[-1].arrival_s == pytest.approx(4.0)


def test_requests_that_come_all_at_once_and_a_long_first_gap_are_no_wrong_unit(tmp_path):
    assert len(notes(tmp_path, *[mooncake(0)] * 50).rows) == 50
    rows = [{"arrival_s": at, "input_tokens": 1, "output_tokens": 1} for at in (0, 86400, 86400.3, 86400.9)]
    assert notes(tmp_path, *rows).rows[1].arrival_s == 86400


def test_time_that_says_more_of_arrival_counts_whatever_unit_another_names(tmp_path):
    rows = [{"timestamp": at, "request_time_ms": 300 - at, "input_tokens": 1, "output_tokens": 1} for at in range(3)]
    assert [row.arrival_s for row in notes(tmp_path, *rows).rows] == [0, 1, 2]


def test_what_a_trace_leaves_out_and_reorders_is_noted(tmp_path):
    rows = [mooncake(900, output=0), mooncake(2000), mooncake(1000, 10), mooncake(2000)]
    trace = notes(tmp_path, *rows)
    assert [row.arrival_s for row in trace.rows] == pytest.approx([0.1, 1.1, 1.1]) and trace.total == 4
    assert trace.notes == ("rows put in order of time", "1 rows without tokens left out", "1 rows equal another")


@pytest.mark.parametrize(
    ("rows", "block_tokens", "note"),
    [
        ([mooncake(0, 1100, hash_ids=["a1f0", "b2e1", "c3"]), mooncake(9, 512, hash_ids=None)], 512, ()),
        (
            [mooncake(0, 521, hash_ids=ids(33)), mooncake(9, 64, hash_ids=ids(4))],
            16,
            ("blocks of 16 tokens, by ids and lengths",),
        ),
        ([{"block_size": 128, "schema": "x"}, mooncake(0, 300, hash_ids=ids(3))], 128, ()),
        ([BAILIAN | mooncake(0, 521, hash_ids=ids(33))], 16, ()),
        (
            [mooncake(0, 1100, hash_ids=[1])],
            512,
            ("1 rows have more or fewer hash_ids than blocks: what has no id is unshared",),
        ),
    ],
)
def test_block_size_is_the_formats_or_that_of_the_lengths(tmp_path, rows, block_tokens, note):
    trace = notes(tmp_path, *rows)
    assert (trace.block_tokens, trace.notes) == (block_tokens, note)


def test_block_ids_that_fit_no_length_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"row 1: 90 hash_ids do not fit input_length 521 in blocks of 512 tokens.*--trace-block"
    ):
        notes(tmp_path, mooncake(0, 521, hash_ids=ids(90)), mooncake(9, 5000, hash_ids=ids(3)))


def test_block_ids_of_sessions_are_apart_unless_their_scope_is_global(tmp_path):
    def session(**more) -> dict:
        return {"id": "x", "block_size": 64, "requests": [{"t": 0, "in": 64, "out": 1, "hash_ids": [7]}], **more}

    first, second = notes(tmp_path, session(), session()).rows
    assert first.block_ids != second.block_ids
    first, second = notes(tmp_path, session(hash_id_scope="global"), session(hash_id_scope="global")).rows
    assert first.block_ids == second.block_ids


def test_trace_plan_keeps_instants_lengths_and_prefixes(tmp_path, tokenizer):
    path = tmp_path / "mooncake.jsonl"
    path.write_text(lines(*(mooncake(1000 * at, 1100, 9, hash_ids=[7, 8, last]) for at, last in enumerate((9, 9, 10)))))
    first, same, other = plan.planned_requests(LoadConfig(trace=str(path), time_scale=0.5), tokenizer, 0)
    assert [request.arrival_s for request in (first, same, other)] == pytest.approx([0.0, 0.5, 1.0])
    shares = [plan.planned_requests(LoadConfig(trace=str(path), time_scale=0.5), tokenizer, 0, at, 2) for at in (0, 1)]
    assert [list(share) for share in shares] == [[first, other], [same]]
    for request in (first, same, other):
        assert tokenizer.count(request.prompt) == 1100 == request.prompt_tokens and request.output_tokens == 9
    assert first.prompt == same.prompt
    common = next(place for place, (a, b) in enumerate(zip(first.prompt, other.prompt, strict=False)) if a != b)
    # What begins both third blocks ("No. ") is equal too.
    assert 1024 <= tokenizer.count(first.prompt[:common]) <= 1032


def test_blocks_of_16_tokens_stand_where_the_servers_do(tmp_path, tokenizer):
    (tmp_path / "t.jsonl").write_text(
        lines(*(BAILIAN | mooncake(at, 330, hash_ids=[*range(20), last]) for at, last in enumerate((1, 2))))
    )
    first, second = plan.planned_requests(LoadConfig(trace=str(tmp_path / "t.jsonl")), tokenizer, 0)
    a, b = ([0, *tokenizer.encode(each.prompt)] for each in (first, second))
    assert a[:320] == b[:320] and a[320:] != b[320:] and len(a) == len(b) == 330


def test_trace_is_replayed_whole_in_part_or_as_many_rows_as_asked(tmp_path, tokenizer):
    path = tmp_path / "t.csv"
    instants = [60 * at for at in range(20)] + [1200 + 0.5 * at for at in range(200)]
    path.write_text(AZURE + "".join(f"{at},20,3\n" for at in instants))

    def planned(**options) -> tuple[list[float], str]:
        config = LoadConfig(trace=str(path), **options)
        plan.check(config)
        words = "; ".join(plan.describe_files(config))
        return [request.arrival_s for request in plan.planned_requests(config, tokenizer, 0)], words

    arrivals, words = planned()
    assert len(arrivals) == 220 and words == "trace t.csv (Azure): 220 of 220 rows over 22 min, mean 0.169 requests/s"
    arrivals, words = planned(requests=10)
    assert len(arrivals) == 10
    assert words == (
        "trace t.csv (Azure): 10 of 220 rows over 9 min, mean 0.0167 requests/s; the whole trace has 0.169 requests/s"
    )
    arrivals, words = planned(trace_from="20m", trace_for="30s")
    assert arrivals == pytest.approx([0.5 * at for at in range(60)])
    assert words.startswith("trace t.csv (Azure): 60 of 220 rows from 20 min on over 29.5 s, mean 2 requests/s; ")
    assert len(planned(trace_from="20m", duration_s=10.0)[0]) == 20
    assert len(planned(trace_from="20m", duration_s=10.0, time_scale=2.0)[0]) == 10
    with pytest.raises(
        UserError, match=r"--trace-from 12 h: t.csv has no request there; its requests come from 0 s to 22 min"
    ):
        planned(trace_from="12h")


@pytest.mark.parametrize("options", [{"trace_from": "1h"}, {"trace": "t", "trace_for": "soon"}, {"trace_unit": "s"}])
def test_options_of_a_trace_are_checked(options):
    with pytest.raises(UserError, match=r"--trace-(from|for|unit)"):
        plan.check(LoadConfig(**options))


def test_durations_are_read_and_written_for_people():
    assert [read_duration("--x", text) for text in ("12h", "1h30m", "90", "500ms", "1.5 m")] == [
        43200,
        5400,
        90,
        0.5,
        90,
    ]
    assert [span(at) for at in (0.5, 90, 600, 43200, 11100, 187200)] == [
        "0.5 s",
        "90 s",
        "10 min",
        "12 h",
        "3 h 5 min",
        "2 d 4 h",
    ]
    for text in ("", "-5s", "5x", "h", "nan", "1..5s"):
        with pytest.raises(UserError, match="--x"):
            read_duration("--x", text)


def test_rows_that_the_model_cannot_take_are_told_and_refused_when_they_are_all(tmp_path):
    (tmp_path / "t.csv").write_text(AZURE + "0,500,12\n1,500,13\n2,600,1\n")
    config = LoadConfig(trace=str(tmp_path / "t.csv"))
    words = plan.rows_too_long(config, 512)
    assert words is not None and words.startswith(
        "2 of 3 rows of the trace have more than the 512 tokens that the model takes (up to 601)"
    )
    assert plan.rows_too_long(config, 601) is None and plan.rows_too_long(config, None) is None
    assert plan.rows_too_long(replace(config, max_input_tokens=100), 512) is None
    with pytest.raises(UserError, match="3 of 3 rows"):
        plan.rows_too_long(config, 500)


def test_blocks_are_sent_as_token_ids_where_their_text_would_be_other_tokens(tmp_path, tokenizer):
    # As tokenizers that drop blanks or case do.
    lossy = replace(tokenizer, decode=lambda ids: tokenizer.decode(ids).upper())
    (tmp_path / "t.jsonl").write_text(lines(*[mooncake(0, 700, hash_ids=[1, 2])] * 2))
    config = LoadConfig(trace=str(tmp_path / "t.jsonl"))
    first, second = plan.planned_requests(config, lossy, 0)
    assert isinstance(first.prompt, tuple) and len(first.prompt) == 700 == first.prompt_tokens and first.prompt[0] == 0
    assert first.prompt == second.prompt
    (chat, _) = plan.planned_requests(replace(config, endpoint="chat"), lossy.for_chat(9), 0)
    assert isinstance(chat.prompt, str) and lossy.for_chat(9).count(chat.prompt) == 700
