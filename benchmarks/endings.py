"""Writes tasks for lm-eval that need no network: passages of the test texts, to be gone on with.

    python benchmarks/endings.py DIRECTORY        # --samples 60

`endings` asks which of four endings follows a passage. `last_word` asks for its next word, which stands in the passage
already, and takes the most likely tokens; LAMBADA (Paperno et al. 2016) asks for the last word of a passage in the same
way, and lm-eval scores it so. docs/external-checks.md compares backends on `endings`, docs/beyond-perplexity.md models.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
WORDS, ENDING, CHOICES = 40, 6, 4
LETTERS = 5  # of a last word at least: most shorter ones are in every passage
TRIES = 100_000  # places looked at before a text is said to be too short
TASK = """task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{sentence}}}}"
"""
ASKED = {
    "endings": """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "last_word": """output_type: loglikelihood
doc_to_target: "{{' ' + word}}"
metric_list: [{metric: acc}, {metric: perplexity}]
""",
}


def write(folder: Path, rows: Iterable[Mapping[str, object]], task: str = "endings") -> None:
    """Writes a task into a directory.

    Args:
        folder: to write to.
        rows: each has a `sentence`; for `endings` also `choices` and the index of the `answer`, else the `word`.
        task: one of `ASKED`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{task}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / f"{task}.yaml").write_text(TASK.format(task=task, data=data) + ASKED[task], encoding="utf-8")


class Places:
    """Draws places of a text, none of which overlaps another."""

    def __init__(self, text: str, draw: random.Random, length: int) -> None:
        """Args: text is the name of a test text, length the words from a place on that belong to it."""
        self.words = (DATA / f"{text}.test.txt").read_text(encoding="utf-8").split()
        self._draw, self._length = draw, length
        self._taken: list[int] = []

    def next(self, fits: Callable[[Sequence[str], int], bool] = lambda words, start: True) -> int:
        """The start of a new place; `fits` is asked with the text's words and a start.

        Raises:
            SystemExit: none is found: the text is too short for that many.
        """
        for _ in range(TRIES):
            start = self._draw.randrange(len(self.words) - self._length)
            if all(abs(start - other) >= self._length for other in self._taken) and fits(self.words, start):
                self._taken.append(start)
                return start
        raise SystemExit(f"--samples: the texts have no place for more than {len(self._taken)} of each")

    def elsewhere(self, start: int) -> int:
        """The start of an ending that lies outside of the place at `start`."""
        while True:
            other = self._draw.randrange(len(self.words) - ENDING)
            if not start - ENDING < other < start + self._length:
                return other

    def span(self, start: int, count: int) -> str:
        """Words from `start` on."""
        return " ".join(self.words[start : start + count])


def passages(samples: int, texts: Sequence[str] = ("wiki",), seed: int = 0) -> list[dict[str, object]]:
    """Passages of `WORDS` words, their endings among others from elsewhere in the text, and which is right.

    Args:
        samples: how many; fewer are the first of more.
        texts: names of test texts, which take turns.
        seed: of what is drawn.
    """
    draw = random.Random(seed)
    places = [Places(text, draw, WORDS + ENDING) for text in texts]
    found: list[dict[str, object]] = []
    for sample in range(samples):
        place = places[sample % len(places)]
        start = place.next()
        others = [place.elsewhere(start) for _ in range(CHOICES - 1)]
        answer = draw.randrange(CHOICES)
        others.insert(answer, start + WORDS)
        choices = [" " + place.span(at, ENDING) for at in others]
        found.append({"sentence": place.span(start, WORDS), "choices": choices, "answer": answer})
    return found


def last_words(samples: int, texts: Sequence[str] = ("wiki",), seed: int = 0) -> list[dict[str, object]]:
    """Passages of `WORDS` words whose next word, `LETTERS` letters at least, is in them. Arguments as of `passages`."""
    draw = random.Random(seed)
    places = [Places(text, draw, WORDS + 1) for text in texts]
    found: list[dict[str, object]] = []
    for sample in range(samples):
        place = places[sample % len(places)]
        start = place.next(_recurs)
        found.append({"sentence": place.span(start, WORDS), "word": place.words[start + WORDS]})
    return found


def _recurs(words: Sequence[str], start: int) -> bool:
    """Whether the word behind the passage at `start` is one of letters alone that stands in the passage."""
    word = words[start + WORDS]
    if len(word) < LETTERS or not word.isalpha():
        return False
    return word in {other.strip(string.punctuation) for other in words[start : start + WORDS]}


def main() -> None:
    """Writes both tasks and their data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--samples", type=int, default=60, help="of each task")
    parser.add_argument("--texts", nargs="+", default=["wiki"], choices=["wiki", "moby"])
    arguments = parser.parse_args()
    folder = arguments.directory.resolve()
    for task, make in {"endings": passages, "last_word": last_words}.items():
        write(folder, make(arguments.samples, arguments.texts), task)
    print(f"{folder}: {arguments.samples} samples; lm_eval run --include_path {folder} --tasks endings,last_word ...")


if __name__ == "__main__":
    main()
