"""Three stages that teach the finished text model to see, each resumable at any step.

First the tower alone: every image token is pulled towards the embeddings of the words for what it
shows and of the numbers of where it is (`seeing.Alphabet`). Then the language model on the tower's
output: questions about screens, mixed with the instructions it knows. Answers alone teach it to
point at *something*; which thing is meant it learns from attention heads that are told where to
look: at the word of the target, some look at the target's image tokens; at a coordinate, one looks
at that word. Last it settles: rounded to q4_0 at every step, it is held to what the text model said
to prompts without a picture, which seeing has disturbed.

Every batch depends on the seed and the number of its step alone, so a run that was killed goes on
from its last saved step to the same weights.
"""

from __future__ import annotations

import copy
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import training
from model import Picture, draw_pictures, text_matrices
from seeing import NOTHING, Alphabet, Asker, Drawn, Question, draw_pool, look, patches, run_tower
from torch.nn import functional
from training import Encoded, Encoder, hidden_states, rounded, text_positions
from transformers import Glm4vForConditionalGeneration

# (layer, head), from 0, that are told where to look: those of the text model that look there most
# once the image tokens say what they should. (4, 0) copies words, and finds the right one already.
MATCH_HEADS = ((3, 2), (4, 0))
READ_HEADS = ((5, 3),)
_MATCH_WEIGHT = _READ_WEIGHT = 0.5
_DRIFT_WEIGHT = 10.0  # as in training.py
_TINY = 1e-30  # far below any share of attention: a larger one hides the gradient of small ones
_CHUNK = 32  # text batches that are drawn together
_OTHER_PICTURES = 32  # of the text samples: drawn by model.draw_pictures, as before


@dataclass(frozen=True)
class Plan:
    """What a run does; the same plan gives the same weights on the same machine."""

    seed: int
    tower_steps: int = 1200
    language_steps: int = 1600
    settle_steps: int = 320
    grids: tuple[tuple[int, int], ...] = ((4, 8), (6, 12))  # columns and rows of image tokens
    grid_shares: tuple[float, ...] = (0.8, 0.2)  # of the steps
    pool: int = 3000  # screens of the first grid; of the others by their share
    tower_batch: int = 32
    tower_rate: float = 1.5e-3
    language_rate: float = 1e-3
    settle_rate: float = 5e-4
    final_rate: float = 3e-5
    warmup_steps: int = 100
    few_items_share: float = 0.1  # of the language steps, at the start: one or two things a screen
    rounded_share: float = 0.25  # of the language steps, at the end: q4_0-rounded weights
    seeing_batches: int = 3  # a step's batches of questions about screens
    text_batches: int = 1  # and of instructions
    settle_seeing_batches: int = 1
    settle_text_batches: int = 3
    system_share: float = 0.25  # of the batches of questions, with system prompts
    system_questions: int = 3  # in such a batch; in others as many as tokens_per_batch allows
    tokens_per_batch: int = 600
    weight_decay: float = 0.05
    checkpoint_seconds: int = 90
    log_steps: int = 25


@dataclass
class Progress:
    """How far a run is."""

    stage: str = "tower"  # then language, settle, done
    step: int = 0  # of the stage
    seconds: float = 0.0
    log: list[str] = field(default_factory=list)


class Stopped(Exception):  # noqa: N818 - not an error: the run was asked to stop and can go on
    """The time is up; the state is saved."""


class Run:
    """A run and its state on disk.

    Args:
        model: The text model, finished; changed in place.
        encoder: Its tokenizer.
        plan: What to do.
        state: The file a stopped run goes on from.
        stop: Asked after every step; True saves and ends the run.
    """

    def __init__(
        self,
        model: Glm4vForConditionalGeneration,
        encoder: Encoder,
        plan: Plan,
        state: Path,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model, self.encoder, self.plan = model, encoder, plan
        self.progress = Progress()
        self._state, self._stop = state, stop
        self._optimizer: torch.optim.AdamW | None = None
        self._resumed: dict[str, Any] | None = None
        self._before, self._begun, self._saved = 0.0, time.monotonic(), time.monotonic()
        self._teacher = copy.deepcopy(model).requires_grad_(
            False
        )  # the text model, before all this
        self.alphabet = Alphabet(model.get_input_embeddings().weight, encoder.tokenizer)

    def resume(self) -> bool:
        """Go on from the saved state; False when there is none."""
        if not self._state.exists():
            return False
        saved = torch.load(self._state, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.progress = Progress(**saved["progress"])
        self._resumed, self._before = saved["optimizer"], self.progress.seconds
        return True

    def finish(self) -> None:
        """Do what is left.

        Raises:
            Stopped: It was asked to stop before that.
        """
        if self.progress.stage == "tower":
            self._train_tower()
            with torch.no_grad():
                for parameter in self.model.model.visual.parameters():
                    parameter.copy_(parameter.to(torch.bfloat16))  # train on what will be saved
            self._next_stage("language")
        if self.progress.stage == "language":
            self._train_language()
            self._next_stage("settle")
        if self.progress.stage == "settle":
            self._train_language()
            self._next_stage("done")

    def _next_stage(self, stage: str) -> None:
        self.progress.stage, self.progress.step = stage, 0
        self._optimizer = None
        self._save()

    # --- the tower ---

    def _train_tower(self) -> None:
        plan, visual = self.plan, self.model.model.visual
        pools = make_pools(plan, plan.seed)
        trained = self._freeze_all_but(visual.parameters())
        optimizer = self._open_optimizer(trained)
        print(f"tower: {sum(map(len, pools))} screens drawn", flush=True)
        tally = Tally("loss", "things", "places")
        with ThreadPoolExecutor(2, initializer=training._use_one_core) as threads:
            while self.progress.step < plan.tower_steps:
                step = self.progress.step
                rate = self._set_rate(optimizer, plan.tower_rate, plan.tower_steps)
                pool = pools[choose_grid(plan, step)]
                work = threads.map(
                    lambda part, at=step, drawn=pool: self._tower_part(trained, drawn, at, part),
                    range(2),
                )
                found = add_gradients(trained, work, [0.5, 0.5])
                self._take_step(optimizer, trained)
                tally.add(*found)
                self._after_step(tally, rate, plan.tower_steps)

    def _tower_part(
        self, trained: list[torch.Tensor], pool: list[Drawn], step: int, part: int
    ) -> tuple[tuple[float, ...], tuple[torch.Tensor, ...]]:
        generator = torch.Generator().manual_seed(self.plan.seed + 2 * step + part)
        count = self.plan.tower_batch // 2
        chosen = torch.randint(len(pool), (count,), generator=generator).tolist()
        batch = [pool[index] for index in chosen]
        found = run_tower(self.model.model.visual, patches(batch, generator), batch)
        loss, things, places = tower_loss(self.alphabet, found, batch)
        return (loss.item(), things, places), torch.autograd.grad(loss, trained)

    # --- the language model ---

    def _train_language(self) -> None:
        plan, model = self.plan, self.model
        settles = self.progress.stage == "settle"
        steps = plan.settle_steps if settles else plan.language_steps
        peak = plan.settle_rate if settles else plan.language_rate
        n_seeing = plan.settle_seeing_batches if settles else plan.seeing_batches
        pools = make_pools(plan, plan.seed + (2 if settles else 1))  # not the stage's before
        seen = [look(model.model.visual, pool) for pool in pools]
        others = draw_pictures(model, _OTHER_PICTURES, plan.seed)
        print(f"{self.progress.stage}: {sum(map(len, pools))} screens drawn and seen", flush=True)
        pictures = [*others, *seen[0][:_OTHER_PICTURES]]
        text = TextBatches(
            plan, self.encoder, pictures, plan.settle_text_batches if settles else plan.text_batches
        )
        trained = self._freeze_all_but(
            [*model.model.language_model.parameters(), *model.lm_head.parameters()]
        )
        optimizer = self._open_optimizer(trained)
        matrices = text_matrices(model)
        begin_rounded = 0 if settles else steps * (1 - plan.rounded_share)
        tally = Tally("loss", "x,y right", "match", "read", "text")
        watch = Watch(model, self._teacher if settles else None)
        with ThreadPoolExecutor(2, initializer=training._use_one_core) as threads:
            while self.progress.step < steps:
                step = self.progress.step
                rate = self._set_rate(optimizer, peak, steps)
                where = choose_grid(plan, step)
                group = [
                    self._questions(pools[where], seen[where], step, n) for n in range(n_seeing)
                ]
                group += text.of_step(step)
                last_part = step >= begin_rounded
                wanted = (
                    list(threads.map(watch.wanted, group)) if last_part else [None] * len(group)
                )
                shares = training.batch_weights(group, equal=False)
                with rounded(model, matrices if last_part else []):
                    work = threads.map(lambda a, b: watch.work(trained, a, b), group, wanted)
                    found = add_gradients(trained, work, shares)
                self._take_step(optimizer, trained)
                tally.add(*found)
                self._after_step(tally, rate, steps)
        watch.close()

    def _questions(
        self, pool: list[Drawn], seen: list[Picture], step: int, number: int
    ) -> list[Encoded]:
        """One batch of questions, as many as its tokens allow."""
        plan = self.plan
        settles = self.progress.stage == "settle"
        stage = 10_007 if settles else 0
        rng = random.Random(plan.seed * 1_000_003 + (step + stage) * 17 + number)
        asker = Asker(self.encoder, rng.randrange(1 << 30))
        few = not settles and step < plan.language_steps * plan.few_items_share
        system = rng.random() < plan.system_share
        batch: list[Encoded] = []
        length = 0
        while True:
            index = rng.randrange(len(pool))
            if few and len(pool[index].screen.items) > 2:
                continue
            question = asker.ask(pool[index], seen[index], system)
            if question is None:
                continue
            length = max(length, len(question.ids))
            if not system and batch and (len(batch) + 1) * length > plan.tokens_per_batch:
                return batch
            batch.append(question)
            if system and len(batch) == plan.system_questions:
                return batch

    # --- both ---

    def _freeze_all_but(self, parameters: Any) -> list[torch.Tensor]:
        trained = list(parameters)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        return trained

    def _open_optimizer(self, trained: list[torch.Tensor]) -> torch.optim.AdamW:
        plan = self.plan
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": plan.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        if self._resumed is not None:
            self._optimizer.load_state_dict(self._resumed)
            self._resumed = None
        return self._optimizer

    def _set_rate(self, optimizer: torch.optim.AdamW, peak: float, steps: int) -> float:
        """Linear warm-up, then a cosine to the final rate."""
        step, plan = self.progress.step, self.plan
        warm = min(1.0, (step + 1) / max(1, plan.warmup_steps))
        span = peak - plan.final_rate
        rate = warm * (plan.final_rate + span * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _take_step(self, optimizer: torch.optim.AdamW, trained: list[torch.Tensor]) -> None:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _after_step(self, tally: Tally, rate: float, steps: int) -> None:
        progress = self.progress
        progress.step += 1
        progress.seconds = self._before + time.monotonic() - self._begun
        if progress.step % self.plan.log_steps == 0 or progress.step == steps:
            line = (
                f"{progress.stage} {progress.step}/{steps} {tally.text()} "
                f"rate {rate:.1e} {progress.seconds:.0f} s"
            )
            progress.log.append(line)
            print(line, flush=True)
        if self._stop():
            self._save()
            raise Stopped
        if time.monotonic() - self._saved > self.plan.checkpoint_seconds:
            self._save()

    def _save(self) -> None:
        part = self._state.with_name(self._state.name + ".part")
        optimizer = None if self._optimizer is None else self._optimizer.state_dict()
        state = {
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "progress": vars(self.progress),
        }
        torch.save(state, part)
        part.replace(self._state)  # the name appears when the file is complete
        self._saved = time.monotonic()


class Tally:
    """Means of some figures since they were last told."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self._rows: list[tuple[float, ...]] = []

    def add(self, *values: float) -> None:
        """Add one step's figures; a figure that a step lacks is not a number."""
        self._rows.append(values)

    def text(self) -> str:
        """Tell the means and begin anew."""
        columns = [[v for v in column if v == v] for column in zip(*self._rows, strict=True)]
        self._rows = []
        means = [sum(column) / len(column) if column else math.nan for column in columns]
        return " ".join(f"{n} {mean:.3f}" for n, mean in zip(self._names, means, strict=True))


class TextBatches:
    """The instructions of the text model's own training, late in it, batch by batch."""

    def __init__(
        self, plan: Plan, encoder: Encoder, pictures: list[Picture], n_batches: int
    ) -> None:
        """Draw them from the plan's seed, ``n_batches`` a step."""
        self._plan, self._encoder, self._pictures = plan, encoder, pictures
        self._n_batches = n_batches
        self._chunk, self._ready = -1, list[list[Encoded]]()

    def of_step(self, step: int) -> list[list[Encoded]]:
        """The batches of one step."""
        count = self._n_batches
        return [self._batch(step * count + n) for n in range(count)]

    def _batch(self, number: int) -> list[Encoded]:
        chunk, at = divmod(number, _CHUNK)
        if chunk != self._chunk:
            plan = training.Plan(
                self._plan.seed * 31 + chunk,
                batches=_CHUNK,
                bare_batches=0,
                early_batches=0,
                rounded_batches=0,
                tokens_per_batch=self._plan.tokens_per_batch,
            )
            source = training.batches(plan, self._encoder, self._pictures)
            self._chunk, self._ready = chunk, list(islice(source, _CHUNK))
        return self._ready[at]


class Watch:
    """Runs batches through the language model and sees where its taught heads look."""

    def __init__(
        self,
        model: Glm4vForConditionalGeneration,
        teacher: Glm4vForConditionalGeneration | None = None,
    ) -> None:
        """Watch a model; a teacher says what it is to answer to prompts without a picture."""
        # sdpa keeps its attention to itself
        model.set_attn_implementation({"text_config": "eager"})
        self._model, self._teacher = model, teacher
        self._seen = threading.local()  # each thread runs a batch of its own
        layers = model.model.language_model.layers
        self._hooks = [
            layers[index].self_attn.register_forward_hook(self._keep(index))
            for index in sorted({layer for layer, _ in (*MATCH_HEADS, *READ_HEADS)})
        ]

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._model.set_attn_implementation({"text_config": "sdpa"})

    def _keep(self, index: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            setattr(self._seen, f"layer{index}", output[1])  # (batch, heads, length, length)

        return hook

    @torch.no_grad()
    def wanted(self, batch: list[Encoded]) -> torch.Tensor:
        """Logits of the text positions to stay close to: its own, unrounded, or the teacher's."""
        own, rows = _text_logits(self._model, batch)
        if self._teacher is None:
            return own
        plain = torch.tensor([item.picture is None for item in batch])
        if not plain.any():
            return own
        taught, _ = _text_logits(self._teacher, batch)
        return torch.where(plain[rows].unsqueeze(1), taught, own)

    def work(
        self, trained: list[torch.Tensor], batch: list[Encoded], wanted: torch.Tensor | None
    ) -> tuple[tuple[float, ...], tuple[torch.Tensor, ...]]:
        """Loss figures and gradients of one batch.

        Args:
            trained: What the gradients are of.
            batch: Questions about screens, or instructions.
            wanted: Logits of the text positions to stay close to; None for free.
        """
        hidden, ids, predicts = hidden_states(self._model, batch)
        text = text_positions(self._model, ids)
        keep = predicts if wanted is None else text
        logits = self._model.lm_head(hidden[keep])
        answers = ids[:, 1:][predicts[:, :-1]]
        answered = logits if wanted is None else logits[predicts[text]]
        loss = functional.cross_entropy(answered, answers)
        figures = [loss.item(), math.nan, math.nan, math.nan, loss.item()]
        if isinstance(batch[0], Question):
            match, read = self._attention_loss(batch)
            right = (answered.argmax(-1) == answers)[self._coordinates(batch, predicts)]
            figures[1:] = [right.float().mean().item(), match.item(), read.item(), math.nan]
            loss = loss + _MATCH_WEIGHT * match + _READ_WEIGHT * read
        if wanted is not None:
            drift = 1 - functional.cosine_similarity(logits, wanted, dim=-1).mean()
            loss = loss + _DRIFT_WEIGHT * drift
        return tuple(figures), torch.autograd.grad(loss, trained)

    def _attention_loss(self, batch: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the taught heads are from looking where they should, in nats."""
        match, read = [], []
        for layer, head in MATCH_HEADS:
            seen = getattr(self._seen, f"layer{layer}")[:, head]
            match += [seen[row, item.word, item.cells].sum() for row, item in enumerate(batch)]
        for layer, head in READ_HEADS:
            seen = getattr(self._seen, f"layer{layer}")[:, head]
            read += [seen[row, list(item.reads), item.word] for row, item in enumerate(batch)]
        return (
            -(torch.stack(match) + _TINY).log().mean(),
            -(torch.cat(read) + _TINY).log().mean(),
        )

    def _coordinates(self, batch: Sequence[Any], predicts: torch.Tensor) -> torch.Tensor:
        """Of the learned positions, those that predict x or y of the last answer."""
        mask = torch.zeros_like(predicts)
        for row, item in enumerate(batch):
            mask[row, list(item.reads)] = True
        return mask[predicts]


def _text_logits(
    model: Glm4vForConditionalGeneration, batch: list[Encoded]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the text positions, and the row of the batch that each is of."""
    hidden, ids, _ = hidden_states(model, batch)
    text = text_positions(model, ids)
    return model.lm_head(hidden[text]), text.nonzero()[:, 0]


def make_pools(plan: Plan, seed: int) -> list[list[Drawn]]:
    """Draw the screens of every grid."""
    counts = [max(1, round(plan.pool * s / plan.grid_shares[0])) for s in plan.grid_shares]
    return [
        draw_pool(seed * 101 + n, count, grid)
        for n, (grid, count) in enumerate(zip(plan.grids, counts, strict=True))
    ]


def choose_grid(plan: Plan, step: int) -> int:
    """Which grid a step's screens have."""
    rng = random.Random(plan.seed * 7 + step)
    return rng.choices(range(len(plan.grids)), plan.grid_shares)[0]


def tower_loss(
    alphabet: Alphabet, found: torch.Tensor, batch: Sequence[Drawn]
) -> tuple[torch.Tensor, float, float]:
    """How far image tokens are from what they should say.

    Returns:
        The loss, and of the tokens that show a thing the shares whose thing and whose place are
        nearest to the right ones.
    """
    classes = torch.cat([drawn.classes for drawn in batch])
    slots = torch.cat([drawn.slots for drawn in batch])
    shown = classes != NOTHING
    weights = torch.where(shown, 1 / shown.sum(), 1 / (~shown).sum()) / 2
    away = (found - alphabet.target(classes, slots)).square().sum(-1)
    things, columns, rows = alphabet.logits(found)
    wrong = functional.cross_entropy(things, classes, reduction="none")
    loss = ((away + wrong) * weights).sum()
    for logits, number in ((columns, 0), (rows, 1)):
        loss = loss + 0.5 * functional.cross_entropy(logits[shown], slots[shown, number])
    same = (things.argmax(-1) == classes)[shown].float().mean().item()
    column_right = columns.argmax(-1)[shown] == slots[shown, 0]
    row_right = rows.argmax(-1)[shown] == slots[shown, 1]
    return loss, same, (column_right & row_right).float().mean().item()


def add_gradients(
    trained: list[torch.Tensor],
    work: Iterator[tuple[tuple[float, ...], tuple[torch.Tensor, ...]]],
    shares: Sequence[float],
) -> list[float]:
    """Set every gradient to the weighted sum over the parts; the figures are plain means."""
    rows = []
    for share, (figures, gradients) in zip(shares, work, strict=True):
        rows.append(figures)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient * share
            else:
                parameter.grad.add_(gradient, alpha=share)
    columns = [[v for v in column if v == v] for column in zip(*rows, strict=True)]
    return [sum(column) / len(column) if column else math.nan for column in columns]
