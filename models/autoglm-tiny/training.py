"""The training loop: batches of seeded samples, loss on answers, checkpoints that survive a stop.

A run depends on its seed and its number of steps: a resumed run skips the batches it has seen.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from instructions import Generator, Sample
from model import Picture, draw_pictures, positions, quantize, text_matrices
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import Glm4vForConditionalGeneration

_PICTURES = 48
_PICTURE_SHARE = 0.15
_DRIFT_WEIGHT = 10.0  # of one minus the cosine to the logits of the weights before rounding
_POOL = 768  # samples that are sorted by length together


@dataclass(frozen=True)
class Plan:
    """What a run does; the same plan gives the same weights on the same machine."""

    seed: int
    batches: int  # in all; a last step may run over
    bare_batches: int  # the first ones hold only the short layout
    early_batches: int  # the first ones go two to a step, each batch of equal weight
    rounded_batches: int  # the last ones see q4_0-rounded weights in the forward pass
    workers: int = 2  # threads, and batches of an early step; later steps have twice as many
    tokens_per_batch: int = 576
    learning_rate: float = 2e-3
    final_learning_rate: float = 3e-5
    warmup_batches: int = 200
    weight_decay: float = 0.05
    checkpoint_seconds: int = 180
    log_steps: int = 50


@dataclass(frozen=True)
class Encoded:
    """A sample as tokens."""

    ids: list[int]
    answer: list[bool]  # True where a token is learned
    picture: Picture | None


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    batches: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


class Encoder:
    """Turns samples into tokens, with the chat template's layout written out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Look up the special tokens by their text."""
        self.tokenizer = tokenizer
        self.ids = tokenizer.get_vocab(with_added_tokens=True)
        self.line_break = self.text("\n")

    def text(self, text: str) -> list[int]:
        """Encode text without anything added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt(
        self, messages: list[dict[str, str]], picture: Picture | None, line_break: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Encode a conversation up to the answer.

        Args:
            messages: OpenAI style, contents as strings.
            picture: Put before the last message's text.
            line_break: Put a line break between the picture and the text.

        Returns:
            Token ids, and which of them are earlier answers.
        """
        ids = [self.ids["[gMASK]"], self.ids["<sop>"]]
        learned = [False, False]
        for number, message in enumerate(messages, 1):
            head = [self.ids[f"<|{message['role']}|>"], *self.line_break]
            if picture is not None and number == len(messages):
                image = [self.ids["<|image|>"]] * len(picture.embeddings)
                head += [self.ids["<|begin_of_image|>"], *image, self.ids["<|end_of_image|>"]]
                head += self.line_break if line_break else []
            body = self.text(message["content"])
            # The client drops the line break before <answer>: that token is no example to follow.
            earlier = message["role"] == "assistant"
            ids += head + body
            learned += [False] * len(head)
            learned += [earlier and token != self.ids["<answer>"] for token in body]
        tail = [self.ids["<|assistant|>"], *self.line_break]
        return ids + tail, learned + [False] * len(tail)

    def sample(self, sample: Sample, picture: Picture | None, line_break: bool) -> Encoded:
        """Encode a conversation with its answer."""
        ids, learned = self.prompt(sample.messages, picture, line_break)
        answer = self.text(sample.step.answer)
        return Encoded(ids + answer, learned + [True] * len(answer), picture)


def batches(plan: Plan, encoder: Encoder, pictures: list[Picture]) -> Iterator[list[Encoded]]:
    """Yield batches of about the same number of tokens, without end."""
    generator = Generator(plan.seed)
    rng = random.Random(plan.seed + 1)
    yielded = 0
    while True:
        pool = []
        bare = yielded < plan.bare_batches
        generator.late = yielded >= plan.early_batches
        for _ in range(_POOL):
            if bare:
                pool.append(encoder.sample(generator.training_sample("bare"), None, False))
                continue
            picture = rng.choice(pictures) if rng.random() < _PICTURE_SHARE else None
            if picture is not None and len(picture.embeddings) > 200 and rng.random() < 0.5:
                picture = None  # large ones are dear
            pool.append(encoder.sample(generator.training_sample(), picture, rng.random() < 0.5))
        pool.sort(key=lambda item: len(item.ids))
        ready: list[list[Encoded]] = [[]]
        for item in pool:
            if ready[-1] and (len(ready[-1]) + 1) * len(item.ids) > plan.tokens_per_batch:
                ready.append([])
            ready[-1].append(item)
        rng.shuffle(ready)
        yielded += len(ready)
        yield from ready


def collate(
    batch: list[Encoded], model: Glm4vForConditionalGeneration, image_token: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[int, int, Picture]]]:
    """Pad a batch on the right, where a causal model never looks.

    Returns:
        Ids ``(batch, length)``, M-RoPE positions ``(3, batch, length)``, which positions predict an
        answer token ``(batch, length)``, and where the pictures go: row, first column, picture.
    """
    length = max(len(item.ids) for item in batch)
    pad = model.config.text_config.pad_token_id
    ids = torch.full((len(batch), length), pad)
    places = torch.zeros(3, len(batch), length, dtype=torch.long)
    predicts = torch.zeros(len(batch), length, dtype=torch.bool)
    images = []
    for row, item in enumerate(batch):
        size = len(item.ids)
        ids[row, :size] = torch.tensor(item.ids)
        places[:, row, :size] = positions(item.ids, image_token, item.picture)
        predicts[row, : size - 1] = torch.tensor(item.answer[1:])
        if item.picture is not None:
            images.append((row, item.ids.index(image_token), item.picture))
    return ids, places, predicts, images


def hidden_states(
    model: Glm4vForConditionalGeneration, batch: list[Encoded]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the language model on a batch, pictures put in.

    Returns:
        Hidden states ``(batch, length, hidden)``, ids, and what predicts an answer token.
    """
    ids, places, predicts, images = collate(batch, model, model.config.image_token_id)
    embedded = model.get_input_embeddings()(ids)
    for row, column, picture in images:
        embedded[row, column : column + len(picture.embeddings)] = picture.embeddings
    output = model.model.language_model(
        inputs_embeds=embedded, position_ids=places, use_cache=False
    )
    return output.last_hidden_state, ids, predicts


def text_positions(model: Glm4vForConditionalGeneration, ids: torch.Tensor) -> torch.Tensor:
    """Mask the positions that are neither padding nor a part of a picture."""
    return (ids != model.config.text_config.pad_token_id) & (ids != model.config.image_token_id)


class Workers:
    """One thread per core, each with a batch of its own: no core waits inside an operation."""

    def __init__(self, model: Glm4vForConditionalGeneration, count: int) -> None:
        """Start ``count`` threads that use one core each."""
        self.model = model
        self.count = count
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self._pool = ThreadPoolExecutor(count, initializer=_use_one_core)

    def gradients(
        self,
        group: list[list[Encoded]],
        weights: list[float],
        wanted: list[torch.Tensor] | None = None,
    ) -> float:
        """Set every parameter's gradient to the weighted mean over the batches.

        Args:
            group: Some batches, a multiple of the workers.
            weights: How much each batch counts; they add up to one.
            wanted: Logits of the text positions to stay close to, for each batch; None for free.

        Returns:
            The weighted mean cross-entropy of the answer tokens.
        """
        work = self._pool.map(self._work, group, wanted or [None] * len(group))
        loss = 0.0
        for part, (found, gradients) in zip(weights, work, strict=True):
            loss += part * found
            for parameter, gradient in zip(self.trained, gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient * part
                else:
                    parameter.grad.add_(gradient, alpha=part)
        return loss

    def logits(self, group: list[list[Encoded]]) -> list[torch.Tensor]:
        """Logits of the text positions of each batch, without gradients."""
        return list(self._pool.map(self._look, group))

    @torch.no_grad()
    def _look(self, batch: list[Encoded]) -> torch.Tensor:
        hidden, ids, _ = hidden_states(self.model, batch)
        return self.model.lm_head(hidden[text_positions(self.model, ids)])

    def _work(
        self, batch: list[Encoded], wanted: torch.Tensor | None
    ) -> tuple[float, tuple[torch.Tensor, ...]]:
        hidden, ids, predicts = hidden_states(self.model, batch)
        answers = ids[:, 1:][predicts[:, :-1]]
        if wanted is None:
            loss = functional.cross_entropy(self.model.lm_head(hidden[predicts]), answers)
            return loss.item(), torch.autograd.grad(loss, self.trained)
        text = text_positions(self.model, ids)
        logits = self.model.lm_head(hidden[text])
        loss = functional.cross_entropy(logits[predicts[text]], answers)
        drift = 1 - functional.cosine_similarity(logits, wanted, dim=-1).mean()
        return loss.item(), torch.autograd.grad(loss + _DRIFT_WEIGHT * drift, self.trained)


def _use_one_core() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@contextmanager
def rounded(model: Glm4vForConditionalGeneration, names: list[str]) -> Iterator[None]:
    """Give matrices their q4_0-rounded values, and at the end their own ones back.

    A gradient found inside is applied to the weights outside: the straight-through estimate.
    """
    parameters = [model.get_parameter(name) for name in names]
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
    with torch.no_grad():
        for parameter, weight in kept:
            parameter.copy_(quantize(weight, "q4_0"))
    yield
    with torch.no_grad():
        for parameter, weight in kept:
            parameter.copy_(weight)


def learning_rate(plan: Plan, seen: int) -> float:
    """Linear warm-up, then a cosine to the final rate, by the batches seen."""
    if seen < plan.warmup_batches:
        return plan.learning_rate * (seen + plan.workers) / plan.warmup_batches
    done = (seen - plan.warmup_batches) / max(1, plan.batches - plan.warmup_batches)
    span = plan.learning_rate - plan.final_learning_rate
    return plan.final_learning_rate + span * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def make_optimizer(model: Glm4vForConditionalGeneration, plan: Plan) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and norms alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim == 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in trained if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), fused=True)


def batch_weights(group: list[list[Encoded]], equal: bool) -> list[float]:
    """Weigh the batches of a step: alike, or by their answer tokens."""
    counts = [1 if equal else sum(sum(item.answer) for item in batch) for batch in group]
    return [count / sum(counts) for count in counts]


def save_state(path: Path, model: Any, optimizer: Any, progress: Progress) -> None:
    """Write the state of a run as a whole: the name appears when the file is complete."""
    part = path.with_name(path.name + ".part")
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "progress": vars(progress),
        },
        part,
    )
    part.replace(path)


def train(
    model: Glm4vForConditionalGeneration,
    tokenizer: Tokenizer,
    plan: Plan,
    state: Path,
    resume: bool,
) -> Progress:
    """Train, or go on training, until the plan's last step.

    Args:
        model: With its first weights; changed in place.
        tokenizer: The checkpoint's own.
        plan: What to do.
        state: The file that a stopped run goes on from.
        resume: Go on from ``state`` when it exists.
    """
    optimizer, progress = make_optimizer(model, plan), Progress()
    if resume and state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        progress = Progress(**saved["progress"])
    matrices = text_matrices(model)
    workers = Workers(model, plan.workers)
    pictures = draw_pictures(model, _PICTURES, plan.seed)
    stream = islice(batches(plan, Encoder(tokenizer), pictures), progress.batches, None)
    model.train()
    begun = last_saved = time.monotonic()
    before, recent = progress.seconds, []
    while progress.batches < plan.batches:
        rate = learning_rate(plan, progress.batches)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        early = progress.batches < plan.early_batches
        group = [next(stream) for _ in range(plan.workers * (1 if early else 2))]
        last_part = progress.batches >= plan.batches - plan.rounded_batches
        wanted = workers.logits(group) if last_part else None
        with rounded(model, matrices if last_part else []):
            recent.append(workers.gradients(group, batch_weights(group, early), wanted))
        torch.nn.utils.clip_grad_norm_(workers.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.batches += len(group)
        progress.seconds = before + time.monotonic() - begun
        if progress.step % plan.log_steps == 0:
            progress.losses.append(sum(recent) / len(recent))
            print(
                f"step {progress.step} "
                f"batch {progress.batches}/{plan.batches} "
                f"loss {progress.losses[-1]:.4f} rate {rate:.1e} {progress.seconds:.0f} s",
                flush=True,
            )
            recent = []
        if time.monotonic() - last_saved > plan.checkpoint_seconds:
            save_state(state, model, optimizer, progress)
            last_saved = time.monotonic()
    save_state(state, model, optimizer, progress)
    model.eval()
    return progress
