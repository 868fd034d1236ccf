"""Forms of prompt files, what is left out of them and counted, and rows that are refused in words."""

import gzip
import json

import pytest

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.load import plan
from pdbench.load.prompts import read_prompt_file
from tests.load.test_generator import load
from tests.support.servers import ScriptedServer, stream, tokens

HUMAN, GPT = {"from": "human", "value": "Question?"}, {"from": "gpt", "value": "A long answer."}
USER, ASSISTANT = {"role": "user", "content": "Question?"}, {"role": "assistant", "content": "A long answer."}
SYSTEM = {"from": "system", "value": "Be brief."}
PARTS = [
    {"type": "text", "text": "Ques"},
    {"type": "image_url", "image_url": {"url": "x"}},
    {"type": "text", "text": "tion?"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [HUMAN, GPT]},
        {"conversations": [SYSTEM, HUMAN, GPT]},
        {"conversation": [USER, ASSISTANT]},
        {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]},
        {"messages": [{"role": "user", "content": PARTS}, ASSISTANT]},
        {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [USER, ASSISTANT]}},
        {"prompt": [USER, ASSISTANT]},
        {"prompt": "Question?", "reply": "A long answer."},
        {"prompt": ["Question?"], "completion": "A long answer."},
        {"text": "Question?", "output": "A long answer."},
        {"question": "Question?", "answer": "A long answer."},
        {"instruction": "Question?", "input": "", "output": "A long answer."},
        {"turns": ["Question?", "And then?"], "reply": "A long answer."},
        {"texts": [{"name": "q", "contents": ["Question?"]}], "response": "A long answer."},
        [USER, ASSISTANT],
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a"])
def test_every_form_of_a_conversation_or_prompt_is_read(tmp_path, row, name):
    data = (json.dumps([row, row]) if name == "a.json" else f"{json.dumps(row)}\r\n\r\n{json.dumps(row)}\r\n").encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else b"\xef\xbb\xbf" + data)
    file = read_prompt_file(path)
    assert file.prompts == [("Question?", "A long answer.")] * 2 and file.notes == ("1 prompts equal another",)


@pytest.mark.parametrize(
    "document",
    [
        ["a", "b"],
        {"data": [{"prompt": "a"}, {"prompt": "b"}]},
        {"rows": [{"row_idx": 0, "row": {"prompt": "a"}}, {"row_idx": 1, "row": {"prompt": "b"}}]},
        {"prompt": ["a", "b"], "id": [1, 2]},
        {"prompts": ["a", "b"]},
    ],
)
def test_rows_inside_one_json_value_are_found(tmp_path, document):
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert [each.prompt for each in read_prompt_file(tmp_path / "a.json").prompts] == ["a", "b"]


def test_text_and_csv_files_are_read(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\ntwo\n\nthree\n")
    assert [each.prompt for each in read_prompt_file(path).prompts] == ["one\ntwo", "three"]
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert [each.prompt for each in read_prompt_file(path).prompts] == ["one", "two"]
    path = tmp_path / "a.csv"
    path.write_text('id;prompt;reply\n1;"a; b";c\n')
    assert read_prompt_file(path).prompts == [("a; b", "c")]


def test_what_a_file_leaves_out_is_counted_and_described(tmp_path):
    path = tmp_path / "a.json"
    rows = [[SYSTEM, HUMAN, GPT], [GPT, HUMAN], [], [HUMAN], [{"from": "human", "value": " "}]]
    path.write_text(json.dumps([{"conversations": turns} for turns in rows]))
    config = LoadConfig(prompt_file=str(path), requests=36)
    assert plan.describe_files(config) == [
        "prompt file a.json: 2 of 5 conversations used, for 36 requests",
        "2 conversations without a person's question first left out",
        "1 empty prompts left out",
        "1 prompts equal another",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "row 1: no JSON"),
        ("a.json", "[" * 100_000, "row 1: no JSON"),
        ("a.jsonl", '{"prompt": "1"}\n{"x": 2}', "row 2: no prompt among the keys x; give text"),
        ("a.jsonl", '{"prompt": "1"}\n{"prompt": null}', "row 2: prompt is null"),
        ("a.jsonl", '{"prompt": "1"}\n{"prompt": 5}', "row 2: prompt is 5"),
        ("a.jsonl", '{"prompt": "1"}\n{"prompt": [1, -2]}', r"row 2: prompt is \[1, -2\]"),
        ("a.jsonl", '{"prompt": "1"}\n{"prompt": "\0"}', "row 2: a NUL byte"),
        ("a.jsonl", '{"prompt": "1"}\n{"prompt": "\\ud83d"}', "row 2: prompt holds half of a character"),
        ("a.jsonl", '{"prompt": "1"}\nnull', "row 2: the prompt is null"),
        ("a.json", '[{"conversations": [5]}]', "row 1: 5 among the turns is no turn"),
        ("a.json", '[{"conversations": []}]', r"holds no prompt \(1 conversations without"),
        ("a.txt", "", "holds no prompt"),
        ("b.json", "[1]", "row 1: the prompt is 1"),
        (
            "b.json",
            '{"train": [{"prompt": "a"}, {"prompt": "b"}], "test": [{"prompt": "c"}, {"prompt": "d"}]}',
            "rows under train and under test",
        ),
        ("b.csv", "id,x\n1,2\n", "row 2: no prompt among the keys id, x"),
    ],
)
def test_bad_prompt_file_is_a_user_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_prompt_file(tmp_path / name)
    assert str(error.value).startswith(f"--prompt-file {tmp_path / name}") and "Error" not in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        read_prompt_file(tmp_path / "missing.txt")


def test_reply_lengths_are_those_of_the_replies(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": [SYSTEM, HUMAN, GPT]}]))
    config = LoadConfig(prompt_file=str(tmp_path / "a.json"), reply_lengths=True, requests=3)
    planned = list(plan.planned_requests(config, tokenizer, 0))
    assert [request.output_tokens for request in planned] == [tokenizer.count("A long answer.")] * 3


def test_token_ids_are_sent_as_token_ids(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": [5, 6, 7]}\n{"prompt_token_ids": [8, 9]}\n')
    with ScriptedServer(stream(tokens(2))) as server:
        load(server, prompt_file=str(tmp_path / "a.jsonl"), requests=2, warmup=0)
        assert [peer.json["prompt"] for peer in server.requests] == [[5, 6, 7], [8, 9]]
    with pytest.raises(UserError, match="token ids, which a chat cannot take"):
        plan.check_files(LoadConfig(prompt_file=str(tmp_path / "a.jsonl"), endpoint="chat"))
