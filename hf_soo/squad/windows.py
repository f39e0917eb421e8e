"""SQuAD's questions as model inputs: windows over the context.

    [CLS] question [SEP] context[w : w + n] [SEP],   w = 0, n - stride, 2(n - stride), ...

the same tokens that `tokenizer(question, context, truncation="only_second", stride=stride,
return_overflowing_tokens=True)` gives. A window is four numbers, and its tokens are put together when they are asked
for: 88,000 windows are 4 MB besides the text's tokens.

Its labels are its positions of the answer's first and last token; 0, the position of [CLS], where it does not hold all
of them or the question has no answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hf_soo.squad.tokens import Ints, Labels, Template, Tokens


class Windows(Dataset[dict[str, Ints]]):
    """Model inputs, one for each window of each question, in the questions' order."""

    def __init__(
        self, tokens: Tokens, template: Template, max_seq_length: int, doc_stride: int, labels: Labels | None
    ) -> None:
        """Lay the windows over the contexts.

        Args:
            tokens: of all questions.
            template: the special tokens.
            max_seq_length: tokens of a window, with the question and the special tokens.
            doc_stride: tokens that consecutive windows of a context share, as in run_qa.py.
            labels: None: there are none.
        """
        self.tokens, self.template = tokens, template
        asked = tokens.questions.lengths
        room, have = max_seq_length - template.size - asked, tokens.contexts.lengths[tokens.context_of]
        step = room - doc_stride
        counts = 1 + np.maximum(0, -(-(have - room) // step))
        self.question = np.repeat(np.arange(len(asked)), counts)  # [windows]
        number = np.arange(len(self.question)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.first = number * step[self.question]  # [windows]: first token of the context
        self.length = np.minimum(room[self.question], have[self.question] - self.first)  # [windows]: how many of them
        self.offset = len(template.before) + asked[self.question] + len(template.between)  # [windows]: where they begin
        self.labels = None if labels is None else self._positions(labels.spans[self.question])

    def keep(self, questions: NDArray[np.bool_]) -> Windows:
        """Only the windows of some questions [questions]."""
        kept = questions[self.question]
        for name in ("question", "first", "length", "offset"):
            setattr(self, name, getattr(self, name)[kept])
        self.labels = None if self.labels is None else self.labels[kept]
        return self

    def _positions(self, spans: Ints) -> Ints:
        """[windows, 2]: the answers' tokens in their windows."""
        inside = (spans[:, 0] >= self.first) & (spans[:, 1] < self.first + self.length)
        return np.where(inside[:, None], spans + (self.offset - self.first)[:, None], 0)

    def __len__(self) -> int:
        """How many windows."""
        return len(self.question)

    def __getitem__(self, index: int) -> dict[str, Ints]:
        """A window's inputs, not padded: [T] each, and its labels."""
        question, first, template = self.question[index], self.first[index], self.template
        context = self.tokens.contexts[self.tokens.context_of[question]][first : first + self.length[index]]
        parts = (template.before, self.tokens.questions[question], template.between, context, template.after)
        item = {"input_ids": np.concatenate(parts)}
        if template.types is not None:
            item["token_type_ids"] = np.full(len(item["input_ids"]), template.types[0])
            item["token_type_ids"][self.offset[index] :] = template.types[1]
        if self.labels is not None:
            item["start_positions"], item["end_positions"] = self.labels[index]
        return item

    def characters(self, windows: Ints, positions: Ints) -> Ints:
        """Where tokens at ``positions`` [...] of ``windows`` [...] lie in their contexts: [..., 2] characters."""
        begin = self.tokens.contexts.splits[self.tokens.context_of[self.question[windows]]]
        spans: Ints = self.tokens.spans[begin + self.first[windows] + positions - self.offset[windows]]
        return spans


class WindowCollator:
    """Pads windows to the longest of a batch."""

    def __init__(self, template: Template, most: int, *, always: bool = False) -> None:
        """Keep how to pad.

        Args:
            template: says the padding token.
            most: length of the longest window; the model may have no more positions.
            always: pad to it; otherwise to the longest of the batch, rounded up to a multiple of 8.
        """
        self.pad, self.most, self.always = template.pad, most, always

    def __call__(self, items: Sequence[dict[str, Ints]]) -> dict[str, Tensor]:
        """A batch of windows: [B, T] each, labels [B]."""
        lengths = np.array([len(item["input_ids"]) for item in items])
        longest = self.most if self.always else min(-(-int(lengths.max()) // 8) * 8, self.most)
        batch = {"attention_mask": (np.arange(longest) < lengths[:, None]).astype(np.int64)}
        for key in items[0]:
            if key in {"start_positions", "end_positions"}:
                batch[key] = np.array([item[key] for item in items], dtype=np.int64)
                continue
            batch[key] = np.full((len(items), longest), self.pad if key == "input_ids" else 0, dtype=np.int64)
            for row, item in zip(batch[key], items, strict=True):
                row[: len(item[key])] = item[key]
        return {key: torch.from_numpy(value) for key, value in batch.items()}
