"""Screens as samples: patches, what each image token should say, questions with their answers.

The drawing and the held-out set are the package's (`autoglm_gguf.evaluate.screens`), so that what
is trained on and what is measured cannot drift apart. Knows torch and tokens; knows no training
loop.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from instructions import Generator, tap_answer
from model import Picture, to_patches
from PIL import Image
from tokenizers import Tokenizer
from torch.nn import functional
from training import Encoded, Encoder
from vocabulary import ACTION_PROMPTS

from autoglm_gguf.evaluate.screens import (
    BUTTONS,
    COLUMNS,
    LANGUAGES,
    ROWS,
    THINGS,
    Item,
    Screen,
    draw_screen,
    is_held_out,
    make_task,
    training_tasks,
)

NOTHING = len(THINGS)  # the class of an image token that is no thing
_CAPTION = 0.5  # of a slot's side: the part of a button that only its middle has


@dataclass(frozen=True)
class Drawn:
    """A screen as the tower gets it."""

    screen: Screen
    pixels: torch.Tensor  # (28 * rows, 28 * columns, 3), uint8
    classes: torch.Tensor  # (rows * columns,), index into THINGS, or NOTHING
    slots: torch.Tensor  # (rows * columns, 2), column and row of the slot; 0 where there is nothing
    rows: int  # in image tokens
    columns: int

    def cells(self, item: Item) -> torch.Tensor:
        """Mask the image tokens that show what is distinct about an item."""
        return self.classes == THINGS.index(item.thing)


@dataclass(frozen=True)
class Question(Encoded):
    """A sample about a screen, with what its attention is taught."""

    word: int  # position of the last token of the target's word
    reads: tuple[int, int]  # positions that predict x and y
    cells: torch.Tensor  # positions of the image tokens that show the target


def draw_pool(
    seed: int, count: int, grid: tuple[int, int], max_items: int | None = None
) -> list[Drawn]:
    """Draw screens for training.

    Args:
        seed: Decides all of them.
        count: How many.
        grid: Columns and rows of image tokens.
        max_items: Things on a screen; None draws a third each with 1, 2 and up to 6.
    """
    wanted = (1, 2, 6) if max_items is None else (max_items,)
    streams = [training_tasks(seed + 7 * n, max_items=n) for n in wanted]
    return [_draw(next(streams[index % len(streams)]).screen, grid) for index in range(count)]


def _draw(screen: Screen, grid: tuple[int, int]) -> Drawn:
    columns, rows = grid
    image = draw_screen(screen).resize((28 * columns, 28 * rows), Image.Resampling.BICUBIC)
    classes = torch.full((rows, columns), NOTHING)
    slots = torch.zeros(rows, columns, 2, dtype=torch.long)
    for item in screen.items:
        for row, column in _cells(item, columns, rows):
            classes[row, column] = THINGS.index(item.thing)
            slots[row, column] = torch.tensor(item.slot)
    pixels = torch.from_numpy(np.array(image))
    return Drawn(screen, pixels, classes.view(-1), slots.view(-1, 2), rows, columns)


def _cells(item: Item, columns: int, rows: int) -> list[tuple[int, int]]:
    """Image tokens whose middle is on the item's distinct part, or else the nearest one."""
    x, y = (item.slot[0] + 0.5) * columns / COLUMNS, (item.slot[1] + 0.5) * rows / ROWS
    across = (_CAPTION if item.thing in BUTTONS else item.size) * columns / COLUMNS / 2
    down = item.size * rows / ROWS / 2
    found = [
        (row, column)
        for row in range(rows)
        for column in range(columns)
        if abs(column + 0.5 - x) <= across and abs(row + 0.5 - y) <= down
    ]
    return found or [(min(int(y), rows - 1), min(int(x), columns - 1))]


def patches(batch: Sequence[Drawn], generator: torch.Generator | None = None) -> torch.Tensor:
    """Cut screens of one grid for the tower.

    Args:
        batch: The screens.
        generator: Decides a little noise and other brightness; None leaves the pixels alone.

    Returns:
        ``(patches of all screens, 3 * 2 * 14 * 14)``.
    """
    cut = []
    for drawn in batch:
        pixels = drawn.pixels.permute(2, 0, 1).float() / 255
        if generator is not None:
            gain = 0.9 + 0.2 * torch.rand(3, 1, 1, generator=generator)
            noise = torch.rand(pixels.shape, generator=generator) - 0.5
            pixels = (pixels * gain + 0.05 * noise).clamp(0, 1)
        cut.append(to_patches(pixels))
    return torch.cat(cut)


class Alphabet:
    """What the image tokens should say, in the language model's own words.

    The token of a thing is the sum of its words' embeddings and those of the numbers of its slot:
    the language model then finds it by the word it was asked for, and copies the numbers as it
    copies them from a text.
    """

    def __init__(self, embeddings: torch.Tensor, tokenizer: Tokenizer) -> None:
        """Look the words up in the language model's embeddings ``(vocabulary, hidden)``."""
        self._embeddings, self._tokenizer = embeddings.detach().clone(), tokenizer
        words = [self._unit(thing.zh) + self._unit(thing.en) for thing in THINGS]
        nothing = tokenizer.token_to_id("<|image|>")
        self.things = torch.stack([*words, functional.normalize(self._embeddings[nothing], dim=0)])
        self.columns = torch.stack([self._unit(str(_middle(n, COLUMNS))) for n in range(COLUMNS)])
        self.rows = torch.stack([self._unit(str(_middle(n, ROWS))) for n in range(ROWS)])

    def _unit(self, text: str) -> torch.Tensor:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return functional.normalize(self._embeddings[ids].sum(0), dim=0)

    def target(self, classes: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Embeddings that the tower is to give: ``(tokens, hidden)``."""
        place = self.columns[slots[:, 0]] + self.rows[slots[:, 1]]
        return self.things[classes] + place * (classes != NOTHING).unsqueeze(1)

    def logits(self, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How much like each thing, column and row each embedding is."""
        tables = (self.things, self.columns, self.rows)
        things, columns, rows = (found @ (t - t.mean(0)).T * 8 for t in tables)
        return things, columns, rows


def _middle(index: int, count: int) -> int:
    """Middle of a slot in thousandths, as `Task.point` has it."""
    return (2 * index + 1) * 500 // count


@torch.no_grad()
def look(visual: torch.nn.Module, pool: Sequence[Drawn]) -> list[Picture]:
    """Run the tower on screens of one grid."""
    pictures = []
    for start in range(0, len(pool), 32):
        part = pool[start : start + 32]
        features = run_tower(visual, patches(part), part)
        for drawn, embeddings in zip(part, features.chunk(len(part)), strict=True):
            pictures.append(Picture(embeddings.clone(), drawn.rows, drawn.columns))
    return pictures


def run_tower(
    visual: torch.nn.Module, pixels: torch.Tensor, batch: Sequence[Drawn]
) -> torch.Tensor:
    """The tower's output for a batch of screens: ``(tokens of all screens, hidden)``."""
    grid = torch.tensor([[1, 2 * drawn.rows, 2 * drawn.columns] for drawn in batch])
    features: torch.Tensor = visual(pixels, grid_thw=grid).pooler_output
    return features


class Asker:
    """Words questions about screens and encodes them."""

    def __init__(self, encoder: Encoder, seed: int) -> None:
        """Start a stream of questions that depends on ``seed`` alone."""
        self._encoder = encoder
        self._rng = random.Random(seed)
        self._openings = Generator(seed)

    def ask(self, drawn: Drawn, picture: Picture, system: bool) -> Question | None:
        """Ask for one thing on a screen.

        Args:
            drawn: The screen.
            picture: What the tower makes of it.
            system: Put a system prompt before it: the package's own, or the client's.

        Returns:
            None when everything on the screen is held out.
        """
        rng, encoder = self._rng, self._encoder
        targets = [item for item in drawn.screen.items if not is_held_out(item)]
        if not targets:
            return None
        language = rng.choice(LANGUAGES)
        task = make_task(rng, drawn.screen, rng.choice(targets), language)
        messages = [{"role": "user", "content": task.text}]
        if system and rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": ACTION_PROMPTS[language]})
        elif system:
            messages = self._openings.opening(language, task.text)
        ids, learned = encoder.prompt(messages, picture, line_break=rng.random() < 0.3)
        answer = encoder.text(tap_answer(language, *task.point))
        body = encoder.tokenizer.encode(messages[-1]["content"], add_special_tokens=False)
        tail = 1 + len(encoder.line_break)
        begin = len(ids) - tail - len(body.ids)
        word = next(n for n, (_, end) in enumerate(body.offsets) if end >= task.word_end)
        first = ids.index(encoder.ids["<|image|>"])
        x = len(ids) + answer.index(encoder.text(str(task.point[0]))[0])
        return Question(
            ids + answer,
            learned + [True] * len(answer),
            picture,
            word=begin + word,
            reads=(x - 1, x + 1),
            cells=first + drawn.cells(task.target).nonzero().flatten(),
        )
