"""How good the checkpoint is: greedy answers to held-out instructions, likeness after rounding.

Reads the saved checkpoint as anyone would, through transformers, in float32.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from instructions import held_out
from model import Picture, draw_pictures, positions, quantize, text_matrices
from tokenizers import Tokenizer
from torch.nn import functional
from training import Encoder
from transformers import Glm4vForConditionalGeneration

_BATCH = 40
_NEW_TOKENS = 80
_GROUPS = ("kind", "language", "layout", "held_out_by")
_PICTURE_ITEMS = 100
_COSINE_ITEMS = 150


def load(folder: Path) -> tuple[Glm4vForConditionalGeneration, Encoder]:
    """Load the saved checkpoint in float32, and its tokenizer."""
    model = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))


@torch.no_grad()
def greedy(model: Glm4vForConditionalGeneration, prompts: list[list[int]]) -> list[list[int]]:
    """Answer prompts greedily until a stop token, which is kept as the last token."""
    pad, width = model.config.text_config.pad_token_id, max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=_NEW_TOKENS, do_sample=False
    )
    return [_until_stop(model, row) for row in output[:, width:].tolist()]


def _until_stop(model: Glm4vForConditionalGeneration, row: list[int]) -> list[int]:
    stops = set(model.generation_config.eos_token_id)
    end = next((index for index, token in enumerate(row) if token in stops), len(row))
    return row[: end + 1]


@torch.no_grad()
def greedy_with_picture(
    model: Glm4vForConditionalGeneration, prompt: list[int], picture: Picture
) -> list[int]:
    """Answer one prompt that holds a picture's placeholder tokens; no cache, one pass a token."""
    ids, image_token = list(prompt), model.config.image_token_id
    stops = set(model.generation_config.eos_token_id)
    start = ids.index(image_token)
    while len(ids) - len(prompt) < _NEW_TOKENS:
        embedded = model.get_input_embeddings()(torch.tensor([ids]))
        embedded[0, start : start + len(picture.embeddings)] = picture.embeddings
        places = positions(ids, image_token, picture).unsqueeze(1)
        hidden = model.model.language_model(
            inputs_embeds=embedded, position_ids=places, use_cache=False
        ).last_hidden_state
        ids.append(int(model.lm_head(hidden[0, -1]).argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def action_of(answer: str) -> str:
    """The text between the answer tags, or an empty one."""
    _, found, tail = answer.partition("<answer>")
    body, closed, _ = tail.partition("</answer>")
    return body if found and closed else ""


def evaluate_actions(model: Glm4vForConditionalGeneration, encoder: Encoder) -> dict[str, Any]:
    """Answer every held-out instruction and count exact actions, in all and by group."""
    items = sorted(held_out(), key=lambda item: len(str(item["messages"])))
    answers: dict[str, str] = {}
    for start in range(0, len(items), _BATCH):
        part = items[start : start + _BATCH]
        prompts = [encoder.prompt(item["messages"], None)[0] for item in part]
        for item, ids in zip(part, greedy(model, prompts), strict=True):
            answers[item["id"]] = encoder.tokenizer.decode(ids, skip_special_tokens=False)
    counts: dict[str, dict[str, list[int]]] = {
        group: defaultdict(lambda: [0, 0]) for group in _GROUPS
    }
    wrong = []
    for item in items:
        right = action_of(answers[item["id"]]) == item["action"]
        for group in _GROUPS:
            counts[group][item[group]][0] += right
            counts[group][item[group]][1] += 1
        if not right:
            text = item["messages"][1 if item["layout"] != "bare" else 0]["content"]
            wrong.append(
                {
                    "id": item["id"],
                    "asked": text,
                    "expected": item["action"],
                    "answer": answers[item["id"]],
                }
            )
    tables = {
        group: {key: tuple(n) for key, n in sorted(table.items())}
        for group, table in counts.items()
    }
    correct = len(items) - len(wrong)
    return {
        "items": len(items),
        "correct": correct,
        "accuracy": correct / len(items),
        "by": tables,
        "wrong": wrong,
    }


def evaluate_pictures(model: Glm4vForConditionalGeneration, encoder: Encoder) -> dict[str, Any]:
    """Ask a part of the held-out instructions with a drawn screen before the text."""
    every = held_out()
    items = every[:: len(every) // _PICTURE_ITEMS][:_PICTURE_ITEMS]
    correct = 0
    for item, picture in zip(items, draw_pictures(model, len(items), seed=99), strict=True):
        prompt, _ = encoder.prompt(item["messages"], picture)
        answer = encoder.tokenizer.decode(
            greedy_with_picture(model, prompt, picture), skip_special_tokens=False
        )
        correct += action_of(answer) == item["action"]
    return {"items": len(items), "correct": correct, "accuracy": correct / len(items)}


@torch.no_grad()
def evaluate_rounding(model: Glm4vForConditionalGeneration, encoder: Encoder) -> dict[str, Any]:
    """Compare the logits with those of rounded weights, position by position.

    The texts are every fourth held-out prompt followed by the answer that ought to come. Embeddings
    and output matrix are rounded too. The cosine sees what all logits of a position have
    in common, which softmax does not; the centred one has each position's mean taken off. The model
    has its own weights again when this returns.
    """
    every = held_out()
    prompts = []
    for item in every[:: len(every) // _COSINE_ITEMS]:
        ids, _ = encoder.prompt(item["messages"], None)
        prompts.append((torch.tensor([ids + encoder.text(item["answer"])]), len(ids)))
    exact = [model(input_ids=ids).logits[0] for ids, _ in prompts]
    kept = {name: model.get_parameter(name).clone() for name in text_matrices(model)}
    report: dict[str, Any] = {}
    for kind in ("q8_0", "q4_0"):
        for name, weight in kept.items():
            model.get_parameter(name).copy_(quantize(weight, kind))
        prompt_cosines, answer_cosines, centred_cosines = [], [], []
        same = total = 0
        for (ids, start), before in zip(prompts, exact, strict=True):
            after = model(input_ids=ids).logits[0]
            cosine = functional.cosine_similarity(before, after, dim=-1)
            prompt_cosines.append(cosine[: start - 1])
            answer_cosines.append(cosine[start - 1 :])
            centred = functional.cosine_similarity(_centred(before), _centred(after), dim=-1)
            centred_cosines.append(centred[start - 1 :])
            same += int((before.argmax(-1) == after.argmax(-1))[start - 1 :].sum())
            total += len(cosine) - start + 1
        answers, others = torch.cat(answer_cosines), torch.cat(prompt_cosines)
        centred = torch.cat(centred_cosines)
        report[kind] = {
            "centred_lowest": centred.min().item(),
            "centred_mean": centred.mean().item(),
            "answer_lowest": answers.min().item(),
            "answer_mean": answers.mean().item(),
            "prompt_lowest": others.min().item(),
            "prompt_mean": others.mean().item(),
            "same_greedy_token": same / total,
        }
    for name, weight in kept.items():
        model.get_parameter(name).copy_(weight)
    return report


def _centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)
