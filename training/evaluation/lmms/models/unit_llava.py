"""lmms-eval's model `unit_llava`: requests in, answers or losses out, whatever fails counted."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from training.errors import first_line
from training.evaluation.lmms.answering import LlavaAnswerer, Question


class UnitLlava(lmms):
    """A folder of `unit llava` or of its training, any LLaVA of transformers' own too.

    A "simple" model in lmms-eval's terms: its "chat" tasks know no multiple choice.

    Args:
        pretrained: folder or Hub id.
        device: `cpu`, `cuda`, `cuda:1`; the first GPU where there is one. With several processes (`accelerate launch`)
            each takes the GPU of its rank.
        dtype: `float32`, `bfloat16`, `float16`; bfloat16 on a GPU and float32 on a CPU unless told otherwise.
        batch_size: questions at once.
        failures: file that takes a line of JSON (`task`, `doc_id`, `error`) for each question that failed.
        max_batch_size: lmms-eval hands it on; not used.

    Raises:
        ValueError: no LLaVA there, or arguments that it does not know.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        failures: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(f"unit_llava has no argument {', '.join(sorted(unknown))}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"unit_llava takes a number of at least 1 as --batch_size, got {batch_size!r}")
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.answerer: LlavaAnswerer | None = LlavaAnswerer(pretrained, device, dtype)
        self.batch_size = int(batch_size)
        self.failures = Path(failures) if failures else None
        self.failed = 0

    @property
    def device(self) -> torch.device:
        """lmms-eval gathers over processes there."""
        return torch.device(self.answerer.device)

    @property
    def tokenizer(self):
        """The language model's."""
        return self.answerer.processor.tokenizer

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Arguments of a request: context, generation settings, doc -> pictures, doc id, task, split. A question that
        fails is answered with nothing."""
        questions = [
            self._question(context, doc_to_visual, doc_id, task, split)
            for context, _, doc_to_visual, doc_id, task, split in (request.args for request in requests)
        ]
        answers: list[Any] = [None] * len(requests)
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        with self._bar(len(requests), "answers") as bar:
            for indices in alike.values():
                settings = dict(requests[indices[0]].args[1] or {})
                self._run(indices, questions, answers, lambda some, s=settings: self.answerer.answer(some, s), bar)
        return [self._marked(requests[i].args[-3:], one, "") for i, one in enumerate(answers)]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Arguments of a request: context, answer or doc -> answer, doc -> pictures, doc id, task, split.

        Returns, as lmms-eval's other models do, the mean loss per token of the answer where its interface says
        log-likelihood: its multiple choice takes the smallest. And whether greedy decoding would give the answer.
        A question that fails has an infinite loss.
        """
        questions = []
        for context, target, doc_to_visual, doc_id, task, split in (request.args for request in requests):
            question = self._question(context, doc_to_visual, doc_id, task, split)
            if isinstance(question, Question):
                target = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
                question = Question(question.text, question.load, str(target).strip())
            questions.append(question)
        losses: list[Any] = [None] * len(requests)
        with self._bar(len(requests), "choices") as bar:
            self._run(range(len(requests)), questions, losses, self.answerer.losses, bar)
        return [self._marked(requests[i].args[-3:], one, (float("inf"), False)) for i, one in enumerate(losses)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: LLaVA's recipes here train answers to one question about one picture."""
        raise NotImplementedError("unit_llava answers single questions; leave out tasks of several rounds")

    def clean(self) -> None:
        """Let go of the weights."""
        self.answerer = None
        super().clean()

    def _question(self, context: str, doc_to_visual: Callable, doc_id: Any, task: str, split: str) -> Question:
        """Pictures are opened with their batch, not all at once."""
        return Question(context, lambda: doc_to_visual(self.task_dict[task][split][doc_id]) or [])

    def _run(self, indices, questions, found: list, compute: Callable, bar) -> None:
        """Fill `found` in batches, the longest texts first so that what does not fit fails at once; a batch that
        fails is tried one by one, and what fails alone leaves its error."""
        order = sorted(indices, key=lambda index: (-len(questions[index].text), index))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            try:
                results = compute([questions[index] for index in batch])
            except Exception:
                results = []
                for index in batch:
                    try:
                        results += compute([questions[index]])
                    except Exception as error:
                        results.append(error)
            for index, result in zip(batch, results, strict=True):
                found[index] = result
            bar.update(len(batch))

    def _marked(self, place: tuple[Any, str, str], result: Any, instead: Any) -> Any:
        """The result, or `instead` with the failure told."""
        if not isinstance(result, Exception):
            return result
        self.failed += 1
        told = {"task": place[1], "doc_id": place[0], "error": first_line(result)}
        if self.failures is None:
            print(f"unit_llava: {told['task']}, {told['doc_id']}: {told['error']}", file=sys.stderr)
        else:
            with self.failures.open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")
        return instead

    def _bar(self, total: int, what: str):
        return tqdm(total=total, desc=f"LLaVA: {what}", unit=" question", disable=self._rank != 0, mininterval=0.5)
