"""What is calibrated on: files by their content, columns by their type, and nothing by accident."""

import bz2
import copy
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fptquant.calibration.formats import looks_like_json, read_text
from fptquant.calibration.text import calibration_windows
from fptquant.errors import FPTQuantError
from fptquant.evaluation.perplexity import evaluation_windows
from fptquant.options.calibration import CalibrationOptions
from tests.conftest import TEXT, VOCABULARY

LINES = [line for line in TEXT.read_text(encoding="utf-8")[:6000].splitlines() if line.strip()]
ROWS = [{"text": line, "n": i} for i, line in enumerate(LINES)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def chatty(tokenizer_with_bos: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a BOS first, with a chat template that does too."""
    tokenizer = copy.deepcopy(tokenizer_with_bos)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def windows_of(tokenizer: PreTrainedTokenizerFast, source: Path | str, **options: Any) -> Tensor:
    fields = {"source": str(source), "sequences": 4, "length": 32, **options}
    return calibration_windows(tokenizer, CalibrationOptions(**fields), VOCABULARY, 0)


def refusal(tokenizer: PreTrainedTokenizerFast, source: Path | str, **options: Any) -> str:
    with pytest.raises(FPTQuantError) as caught:
        windows_of(tokenizer, source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_jsonl(path: Path, column: str, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps({column: value, "other": 1}) + "\n" for value in values))
    return path


# -- files --


def separated(separator: str) -> Callable[[Path], None]:
    import csv

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter=separator)
            table.writerows([("text", "n"), *((row["text"], row["n"]) for row in ROWS)])

    return write


def arrow_table() -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(ROWS)


def arrow_stream(path: Path) -> None:
    import pyarrow

    table = arrow_table()
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)


def parquet(path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow_table(), path)


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


FILES: dict[str, Callable[[Path], None]] = {
    "rows.json": content(ARRAY),
    "rows.JSONL": content(JSONL),
    "rows.ndjson": content(JSONL),
    "rows[1]*.jsonl": content(JSONL),
    "lines.txt": content(b"\n" + JSONL),
    "array.txt": content(ARRAY),
    "no_suffix": content(b"\xef\xbb\xbf" + JSONL),
    "rows.csv": separated(","),
    "rows.TSV": separated("\t"),
    "rows.parquet": parquet,
    "parquet.txt": parquet,
    "rows.arrow": arrow_stream,
    "rows.jsonl.gz": content(gzip.compress(JSONL)),
    "rows.json.bz2": content(bz2.compress(ARRAY)),
    "rows.ndjson.XZ": content(lzma.compress(JSONL)),
    "gzip.dat": content(gzip.compress(JSONL)),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_in_every_format(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(JSONL)
    FILES[name](tmp_path / name)
    expected = windows_of(tokenizer, tmp_path / "rows.jsonl")
    assert torch.equal(windows_of(tokenizer, tmp_path / name), expected)
    assert '"text"' not in tokenizer.decode(expected.flatten().tolist())


@pytest.mark.parametrize("name", ["t.txt.gz", "t.bz2", "t.xz", "t.zst"])
def test_compressed_text(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = "\n".join(LINES).encode()
    if name.endswith("zst"):
        packed = pytest.importorskip("zstandard").compress(text)
    else:
        packed = {"gz": gzip, "bz2": bz2, "xz": lzma}[name.rpartition(".")[2]].compress(text)  # type: ignore[attr-defined]
    (tmp_path / "t.txt").write_bytes(text)
    (tmp_path / name).write_bytes(packed)
    assert torch.equal(windows_of(tokenizer, tmp_path / name), windows_of(tokenizer, tmp_path / "t.txt"))
    assert torch.equal(
        evaluation_windows(tokenizer, tmp_path / name, 2, 16), evaluation_windows(tokenizer, tmp_path / "t.txt", 2, 16)
    )


NO_TEXT = {
    "empty.txt": b"",
    "utf16.txt": ("Some text. " * 500).encode("utf-16"),
    "utf16_without_bom.txt": ("Some text. " * 500).encode("utf-16-le"),
    "model.safetensors": (100).to_bytes(8, "little") + b'{"a": 1}' + b" " * 1000,
    "late_nul.txt": b"Some text. " * 1000 + b"\0",
    "archive.txt": b"PK\x03\x04" + b"text " * 1000,
    "ascii.pdf": b"%PDF-1.4\n" + b"text " * 1000,
    "rows.parquet": b"text " * 1000,
    "parquet.gz": gzip.compress(b"PAR1" + b"text " * 1000),
    "truncated.txt.gz": gzip.compress(JSONL)[:500],
    "latin.txt.gz": gzip.compress("Käse ".encode("latin-1") * 1000),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_bytes_are_no_text(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(NO_TEXT[name])
    assert name in refusal(tokenizer, tmp_path / name)
    with pytest.raises(FPTQuantError, match=name):
        evaluation_windows(tokenizer, tmp_path / name, 1, 8)


def test_text_that_starts_like_json() -> None:
    prose = ["[1] A note.\n[2] Another.", "[[link]] x", "[ ] to do", "{{ x }}", '"Yes," he said.', "[]\ntext", ""]
    assert not any(map(looks_like_json, prose))
    syntax = ['{"text": "a', " [\n{'a': 1", '["a", "b"]', "[1, 2]\n[3]\n", '\n{ "a": [', "[[1]]"]
    assert all(map(looks_like_json, syntax))


def test_json_as_text_when_that_is_wanted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(JSONL)
    message = refusal(tokenizer, path, field="body")
    assert "has no column 'body'; it has: text, n" in message and f"'text:{path}' takes it as text" in message
    with pytest.raises(FPTQuantError, match="is json, not text: 'text:"):
        evaluation_windows(tokenizer, path, 1, 8)
    tokens = tokenizer(JSONL.decode(), add_special_tokens=False)["input_ids"]
    assert windows_of(tokenizer, f"text:{path}", sequences=1).shape == (1, 32)
    assert '"text"' in read_text(f"text:{path}")
    assert evaluation_windows(tokenizer, Path(f"text:{path}"), 1, 8).flatten().tolist() == tokens[:8]


@pytest.mark.parametrize("rendered", [json.dumps, str], ids=["JSON", "repr"])
def test_objects_stored_as_strings(rendered: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A directory of .txt files that hold JSON lines; a column of a CSV that holds lists."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.txt").write_text("".join(f"{rendered(row)}\n" for row in ROWS))
    assert "holds JSON (or Python objects) as text" in refusal(tokenizer, tmp_path / "data")
    assert windows_of(tokenizer, f"text:{tmp_path / 'data'}").shape == (4, 32)
    path = write_jsonl(tmp_path / "rows.jsonl", "text", [rendered([{"role": "user", "content": "a"}])] * 20)
    assert "column 'text'" in refusal(tokenizer, path)


# -- rows --


def chats() -> list[list[dict[str, Any]]]:
    """More fields in some messages than in others, which Arrow fills up with nulls."""
    return [
        [
            {"role": "system", "content": "Be brief.", "name": "root"},
            {"role": "user", "content": first},
            {"role": "assistant", "content": second},
        ]
        for first, second in zip(LINES[::2], LINES[1::2], strict=False)
    ]


def test_chats_go_through_the_template(chatty: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The same chat in every row, so that their order doesn't matter; its BOS is in front of the windows only."""
    chat = chats()[0]
    path = write_jsonl(tmp_path / "chats.jsonl", "messages", [chat] * 20)
    rendered = str(chatty.apply_chat_template(chat, tokenize=False))
    assert rendered.startswith("<s>[system] Be brief.\n[user] ")
    stream = chatty(rendered.removeprefix("<s>"), add_special_tokens=False)["input_ids"] * 20
    pieces = [[0, *stream[at : at + 31]] for at in range(0, len(stream) - 30, 31)]
    found = windows_of(chatty, path, field="messages", sequences=20).tolist()
    assert all(row in pieces for row in found)
    assert "[user] " in chatty.decode(sum(found, [])) and 0 not in sum((row[1:] for row in found), [])


def test_sharegpt_is_the_same_chat(chatty: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    other = [[{"from": speakers[m["role"]], "value": m["content"]} for m in chat] for chat in chats()]
    path = write_jsonl(tmp_path / "a.jsonl", "messages", chats())
    sharegpt = write_jsonl(tmp_path / "b.jsonl", "conversations", other)
    expected = windows_of(chatty, path, field="messages")
    assert torch.equal(windows_of(chatty, sharegpt, field="conversations"), expected)


def test_calls_of_tools_reach_the_template(chatty: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Without the nulls that Arrow adds: fields of one row's arguments in all the others."""
    chatty.chat_template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson }}{% endfor %}"
    calls = [{"function": {"name": "f", "arguments": {name: 1}}} for name in ("left", "right")]
    rows = [[{"role": "assistant", "content": None, "tool_calls": [call]}] for call in calls] * 20
    found = windows_of(chatty, write_jsonl(tmp_path / "a.jsonl", "messages", rows), field="messages")
    shown = chatty.decode(found.flatten().tolist())
    assert '"arguments": {"' in shown and "null" not in shown and "None" not in shown


def test_token_ids_are_taken_as_they_are(tokenizer_with_bos: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [[0, *range(10 + i, 41 + i)] for i in range(20)]
    path = write_jsonl(tmp_path / "ids.jsonl", "input_ids", rows)
    found = windows_of(tokenizer_with_bos, path, field="input_ids", sequences=20).tolist()
    assert sorted(found) == rows  # their own BOS is not doubled
    found = windows_of(tokenizer_with_bos, path, field="input_ids", special_tokens=False, length=64)
    assert all(row[32] == 0 and row[:32] in rows for row in found.tolist())
    assert "has 640 tokens, but 21 sequences" in refusal(tokenizer_with_bos, path, field="input_ids", sequences=21)


REFUSED: dict[str, tuple[Any, str]] = {
    "a dict": ({"a": 1}, "holds dict"),
    "bool": (True, "holds bool"),
    "int": (3, "holds int"),
    "float": (1.5, "holds float"),
    "date": ("2020-01-01", "holds datetime"),
    "list of texts": (["a", "b"], "holds list of str"),
    "list of lists": ([[1], [2]], "holds list of list"),
    "list of bool": ([True, False], "holds list of bool"),
    "list of float": ([0.5], "holds list of float"),
    "null among ids": ([1, None], "holds list of NoneType and int"),
    "negative id": ([1, -100], "holds -100, but the model's tokens are 0 to 319"),
    "unknown id": ([1, VOCABULARY], "holds 320, but the model's tokens are 0 to 319"),
    "null": (None, "is empty in every row"),
    "blank": (" \n", "is empty in every row"),
    "empty list": ([], "is empty in every row"),
    "NUL": ("a\0b", "is binary"),
    "message without role": ([{"content": "a"}], "no message"),
    "both forms": ([{"role": "user", "content": "a", "from": "human", "value": "b"}], "no message"),
    "another speaker": ([{"from": "function_call", "value": "a"}], "message from 'function_call'"),
    "no content": ([{"role": "user", "content": None}], "content of a message is null"),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "content of a message is list of dict"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_types_are_refused_by_name(case: str, chatty: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    value, expected = REFUSED[case]
    path = write_jsonl(tmp_path / "rows.jsonl", "col", [value] * 40)
    message = refusal(chatty, path, field="col")
    assert expected in message and "column 'col' of " in message


def test_an_image_column_is_refused_and_others_do_not_matter(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    import datasets

    columns = {"text": LINES, "picture": [{"path": None, "bytes": b"no picture"}] * len(LINES)}
    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "data"))
    assert windows_of(tokenizer, tmp_path / "data").shape == (4, 32)
    assert "column 'picture' of " in refusal(tokenizer, tmp_path / "data", field="picture")


def test_rows_saved_with_a_format(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"input_ids": [list(range(10, 42))] * 8}).with_format("torch")
    data.save_to_disk(str(tmp_path / "data"))
    assert windows_of(tokenizer, tmp_path / "data", field="input_ids").tolist() == [list(range(10, 42))] * 4


def test_chats_without_a_template_or_one_that_fails(
    tokenizer: PreTrainedTokenizerFast, chatty: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", "messages", chats())
    message = refusal(tokenizer, path)
    assert "no column 'text'; it has: messages, other (choose with --calibration-field messages)" in message
    assert "the tokenizer has no chat template" in refusal(tokenizer, path, field="messages")
    chatty.chat_template = "{{ raise_exception('no system\n role') }}"
    assert "the chat template fails on a chat of it (no system role)" in refusal(chatty, path, field="messages")


def test_no_such_column_of_a_broken_file_says_why(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("text\nKäse\n".encode("latin-1"))
    message = refusal(tokenizer, tmp_path / "rows.csv")
    assert "is no csv that can be read: 'utf-8' codec can't decode" in message and "text:" in message
