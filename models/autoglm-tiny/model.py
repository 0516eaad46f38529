"""The network: built from the saved configuration, its first weights, pictures for its prompts.

Knows torch and transformers; knows nothing of instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, Glm4vForConditionalGeneration

EMBEDDING_STD = 0.1
_POST_NORM = 0.05  # first weight of the norms after attention and MLP: small residual updates
_BLOCK = 32  # weights per q4_0 or q8_0 block


@dataclass(frozen=True)
class Picture:
    """A picture as the language model sees it."""

    embeddings: torch.Tensor  # (tokens, hidden), the vision tower's output
    height: int  # in image tokens (28 px)
    width: int


def build_model(folder: Path, seed: int) -> Glm4vForConditionalGeneration:
    """Make the network with seeded first weights, in float32, the vision tower frozen.

    Args:
        folder: Holds config.json and tokenizer.json.
        seed: Decides every weight.
    """
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = Glm4vForConditionalGeneration(config).to(torch.float32)
    with torch.no_grad():
        _first_text_weights(model)
        _first_embeddings(model, Tokenizer.from_file(str(folder / "tokenizer.json")))
        _first_vision_weights(model)
        for parameter in model.model.visual.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))  # train on what will be saved
            parameter.requires_grad_(False)
    return model


def _first_text_weights(model: Glm4vForConditionalGeneration) -> None:
    for name, parameter in model.model.language_model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            parameter.zero_()
        elif "post_self_attn" in name or "post_mlp" in name:
            parameter.fill_(_POST_NORM)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        share = attention.num_heads // attention.num_key_value_heads
        values = attention.v_proj.weight.view(-1, attention.head_dim, attention.hidden_size)
        # Each head first hands on what it looks at: a token is copied once a head finds it.
        heads = values.repeat_interleave(share, dim=0).reshape(-1, attention.hidden_size)
        attention.o_proj.weight.copy_(heads.T)


def _first_embeddings(model: Glm4vForConditionalGeneration, tokenizer: Tokenizer) -> None:
    """Random rows, the numbers' rows alike in part; output rows start as the input rows."""
    embeddings = model.model.language_model.embed_tokens.weight
    embeddings.normal_(0, EMBEDDING_STD)
    numbers = [tokenizer.token_to_id(str(number)) for number in range(1000)]
    alike = torch.randn(embeddings.shape[1]) * EMBEDDING_STD
    embeddings[numbers] = embeddings[numbers] * 0.8 + alike * 0.6
    model.lm_head.weight.copy_(embeddings / 2)


def _first_vision_weights(model: Glm4vForConditionalGeneration) -> None:
    """Random weights of a size that lets a picture's content through to the merger's output."""
    visual = model.model.visual
    for name, parameter in visual.named_parameters():
        if parameter.ndim < 2:
            continue
        fan_in = parameter[0].numel()
        parameter.normal_(0, fan_in**-0.5)
        if name.startswith("embeddings."):
            parameter.normal_(0, 0.3)
        elif name.startswith("blocks.") and name.endswith(("attn.proj.weight", "down_proj.weight")):
            parameter.mul_(0.5)
    features = torch.cat([picture.embeddings for picture in draw_pictures(model, 4, seed=0)])
    visual.merger.down_proj.weight.mul_(EMBEDDING_STD / features.square().mean().sqrt())


def draw_pixels(generator: torch.Generator, height: int, width: int) -> torch.Tensor:
    """Draw a made-up screen: coloured boxes and stripes on a plain ground.

    Args:
        generator: Decides the drawing.
        height: In image tokens (28 px).
        width: In image tokens (28 px).

    Returns:
        ``(3, 28 * height, 28 * width)``, values in 0..1.
    """
    pixels = torch.rand(3, 1, 1, generator=generator).repeat(1, 28 * height, 28 * width)
    for _ in range(6 + height * width // 4):
        top = int(torch.randint(28 * height, (), generator=generator))
        left = int(torch.randint(28 * width, (), generator=generator))
        tall, wide = (int(torch.randint(6, 120, (), generator=generator)) for _ in range(2))
        box = pixels[:, top : top + tall, left : left + wide]
        box.copy_(torch.rand(3, 1, 1, generator=generator).expand_as(box))
        if tall % 3 == 0:
            box[:, ::4] = torch.rand(3, 1, 1, generator=generator)
    noise = torch.rand(pixels.shape, generator=generator) - 0.5
    return (pixels + 0.06 * noise).clamp(0, 1)


def to_patches(pixels: torch.Tensor) -> torch.Tensor:
    """Normalise and cut pixels as the published preprocessor does.

    Args:
        pixels: ``(3, height, width)`` in 0..1, both sides multiples of 28.

    Returns:
        ``(patches, 3 * 2 * 14 * 14)``, the four patches of an image token side by side.
    """
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    rows, columns = pixels.shape[1] // 28, pixels.shape[2] // 28
    cut = ((pixels - mean) / std).view(3, rows, 2, 14, columns, 2, 14)
    cut = cut.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)  # rows, columns, 2, 2, 3, (time), 14, 14
    return cut.expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(rows * columns * 4, -1)


@torch.no_grad()
def draw_pictures(model: Glm4vForConditionalGeneration, count: int, seed: int) -> list[Picture]:
    """Draw screens of many sizes and run the vision tower on them; one in eight is large."""
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for index in range(count):
        low, high = (18, 27) if index % 8 == 7 else (4, 11)
        height, width = (int(torch.randint(low, high, (), generator=generator)) for _ in range(2))
        height = max(height, 8) if width < 8 else height  # at least 32 image tokens
        patches = to_patches(draw_pixels(generator, height, width))
        grid = torch.tensor([[1, 2 * height, 2 * width]])
        features = model.model.visual(patches, grid_thw=grid).pooler_output
        pictures.append(Picture(features.reshape(height * width, -1), height, width))
    return pictures


def positions(ids: list[int], image_token: int, picture: Picture | None) -> torch.Tensor:
    """Number the tokens for M-RoPE: three rows (time, height, width), as transformers does."""
    if picture is None:
        return torch.arange(len(ids)).expand(3, -1)
    start = ids.index(image_token)
    rows = torch.arange(picture.height).repeat_interleave(picture.width)
    columns = torch.arange(picture.width).repeat(picture.height)
    inside = torch.stack([torch.zeros_like(rows), rows, columns]) + start
    after = torch.arange(len(ids) - start - len(rows)) + start + max(picture.height, picture.width)
    return torch.cat([torch.arange(start).expand(3, -1), inside, after.expand(3, -1)], dim=1)


def quantize(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Round a matrix as llama.cpp's q4_0 or q8_0 does, blocks of 32 along the inputs.

    Args:
        weight: ``(outputs, inputs)``, inputs a multiple of 32.
        kind: ``q4_0`` or ``q8_0``.

    Returns:
        The rounded weights, same shape and type.
    """
    blocks = weight.reshape(-1, _BLOCK)
    if kind == "q8_0":
        scale = blocks.abs().amax(1, keepdim=True) / 127
        inverse = torch.where(scale == 0, 0, 1 / scale)
        return (torch.round(blocks * inverse) * scale.half().float()).view_as(weight)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    scale = torch.where(-low >= high, low, high) / -8
    inverse = torch.where(scale == 0, 0, 1 / scale)
    levels = torch.floor(blocks * inverse + 8.5).clamp_(0, 15) - 8
    return (levels * scale.half().float()).view_as(weight)


def text_matrices(model: Glm4vForConditionalGeneration) -> list[str]:
    """Name the matrices that a quantised GGUF of the language model rounds."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not name.startswith("model.visual.")
    ]
