"""What a GGUF pair says about itself, completed where it is silent, each completion with a reason.

Pairs made by upstream's converter lack the stop list and the image limits; some files in the wild
lack the template. The completions come from token *names* and GLM's published defaults, never from
fixed ids. Knows headers only; loads nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from autoglm_gguf.errors import GGUFError, PairMismatchError
from autoglm_gguf.gguf import names
from autoglm_gguf.gguf.header import Header, read_header

GLM_MIN_PIXELS, GLM_MAX_PIXELS = 12_544, 47_040_000
"""GLM-4.1V's ``preprocessor_config.json``: two frames of 28x28 pixels, 8 and 30,000 times."""
GLM_MERGE_SIZE = 2
"""Patches per image token side."""
GLM_TEMPLATE = """[gMASK]<sop>
{%- for m in messages -%}
{%- set role = 'observation' if m.role == 'tool' else m.role -%}
{{ '<|' + role + '|>\\n' }}
{%- if m.content is string -%}{{ m.content }}
{%- else -%}
{%- for part in m.content -%}
{%- if part.type == 'image' -%}<|begin_of_image|><|image|><|end_of_image|>
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""
_TOWER_TENSORS = (
    "v.patch_embd.weight",
    "v.patch_embd.weight.1",
    "v.patch_embd.bias",
    "v.position_embd.weight",
    "v.blk.0.attn_qkv.weight",
    "v.post_ln.weight",
    "mm.patch_merger.weight",
    "mm.patch_merger.bias",
    "mm.model.fc.weight",
    "mm.down.weight",
)
_MAX_MERGE_SIZE = 16
MOST_PIXELS = 2**28
"""Above this a lower limit would blow every screenshot up to gigabytes."""
_TYPE_SUFFIX = re.compile(r"(.+)-(b?f16|f32|i?q\d\w*|tq\d\w*|mxfp4\w*|fit_\d+[gmk]?b)")
_TEMPLATE_TOKENS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>")


@dataclass(frozen=True, slots=True)
class VisionLimits:
    """How large an image the tower takes, in transformers' terms."""

    patch_size: int
    """Pixels per patch side."""
    merge_size: int
    """Patches per image token side."""
    min_pixels: int
    max_pixels: int
    """Two frames of width times height."""

    @property
    def factor(self) -> int:
        """Pixels per image token side."""
        return self.patch_size * self.merge_size

    @property
    def max_tokens(self) -> int:
        """Image tokens of the largest image."""
        return self.max_pixels // (2 * self.factor**2)


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a pair needs to be driven: template, stops, image limits, and how they were found."""

    text: Header
    mmproj: Header | None
    chat_template: str | None
    stop_ids: frozenset[int]
    vision: VisionLimits | None
    notes: tuple[str, ...]
    """One sentence per completion, for a person."""

    @property
    def paths(self) -> tuple[Path, Path | None]:
        """Of the text and of the mmproj."""
        return self.text.path, None if self.mmproj is None else self.mmproj.path


def describe_pair(text: Path, mmproj: Path | None) -> ModelDescription:
    """Read and check a text GGUF and its mmproj.

    Raises:
        GGUFError: A file is broken or of another kind.
        PairMismatchError: Both are sound but do not belong together.
    """
    header = read_header(text)
    _check_text(header)  # before the second file is looked for
    return describe_headers(header, None if mmproj is None else read_header(mmproj))


def describe_headers(header: Header, tower: Header | None) -> ModelDescription:
    """Check a text GGUF's header and its mmproj's, also of files that are yet to be written.

    Raises:
        GGUFError: A file is of another kind, or lacks what is needed.
        PairMismatchError: Both are sound but do not belong together.
    """
    _check_text(header)
    if tower is not None:
        _check_mmproj(header, tower)
    notes: list[str] = []
    tokens = header.metadata[names.TOKENS]
    template = _template(header, tokens, notes)
    stop_ids = _stop_ids(header, tokens, notes)
    vision = None if tower is None else _limits(tower, notes)
    return ModelDescription(header, tower, template, stop_ids, vision, tuple(notes))


def find_mmproj(text: Path) -> Path | None:
    """The mmproj beside a text GGUF: same name, any type; or the only one in the directory."""
    candidates = sorted(text.parent.glob(f"{names.MMPROJ_PREFIX}*.gguf"))
    base, own_type = _split_type(text.stem)
    # The mmproj of the text file's own type first, then what `convert` makes for small types.
    order = (own_type, "q8_0", "f16", "bf16", "f32", "q4_0")
    named: list[tuple[int, Path]] = []
    for path in candidates:
        name, kind = _split_type(path.stem.removeprefix(names.MMPROJ_PREFIX))
        if name == base:
            named.append((order.index(kind) if kind in order else len(order), path))
    if named:
        return min(named)[1]
    return candidates[0] if len(candidates) == 1 else None


def _split_type(stem: str) -> tuple[str, str]:
    """``Name-Q8_0`` to ``("name", "q8_0")``; the type is empty where the name ends with none."""
    match = _TYPE_SUFFIX.fullmatch(stem.lower())
    return (match.group(1), match.group(2)) if match else (stem.lower(), "")


def _check_text(header: Header) -> None:
    if header.metadata.get(names.TYPE) == "mmproj" or header.architecture == "clip":
        raise GGUFError(
            f"{header.path.name}: an mmproj, not a text model",
            hint="give the text GGUF as MODEL and this one with --mmproj",
        )
    if header.architecture not in names.TEXT_ARCHITECTURES:
        raise GGUFError(
            f"{header.path.name}: architecture {header.architecture!r} is not run here "
            f"(required: {' or '.join(names.TEXT_ARCHITECTURES)})",
            hint="convert a checkpoint of the GLM family with: autoglm-gguf convert",
        )
    tokens = header.metadata.get(names.TOKENS)
    if not isinstance(tokens, list) or not tokens:
        raise GGUFError(f"{header.path.name}: holds no vocabulary ({names.TOKENS})")
    if not header.tensors:
        raise GGUFError(f"{header.path.name}: holds no tensors")


def _check_mmproj(text: Header, tower: Header) -> None:
    projector = tower.metadata.get(names.PROJECTOR_TYPE)
    if tower.architecture != "clip" or projector != names.PROJECTOR_GLM4V:
        raise PairMismatchError(
            f"{tower.path.name}: not a GLM-4V mmproj (architecture {tower.architecture!r}, "
            f"projector {projector!r})",
            hint="give the mmproj file that was converted together with the text model",
        )
    width, required = tower.get_int(names.PROJECTION_DIM), text.get_int(names.EMBEDDING_LENGTH)
    if width != required:
        raise PairMismatchError(
            f"{tower.path.name}: mmproj of another model (embeddings of {width}, "
            f"{text.path.name} takes {required})",
            hint="give the mmproj file that was converted together with the text model",
        )
    missing = [name for name in _TOWER_TENSORS if name not in tower.tensors]
    if missing:  # libmtmd ends the process over some of these at the first image
        raise GGUFError(
            f"{tower.path.name}: not a whole GLM-4V mmproj (tensor {missing[0]!r} is missing)",
            hint="convert the checkpoint again",
        )
    ours, theirs = (h.metadata.get(names.SOURCE_ID) for h in (text, tower))
    if ours is not None and theirs is not None and ours != theirs:
        raise PairMismatchError(
            f"{tower.path.name}: mmproj of another checkpoint (fingerprint {theirs}, "
            f"{text.path.name} has {ours})",
            hint="convert the checkpoint again, text and mmproj together",
        )


def _template(header: Header, tokens: list[str], notes: list[str]) -> str | None:
    template = header.metadata.get(names.CHAT_TEMPLATE)
    if isinstance(template, str) and template.strip():
        return template
    if set(_TEMPLATE_TOKENS) <= set(tokens):
        notes.append("chat template: GLM-4.1V's, since the file has none but has its role tokens")
        return GLM_TEMPLATE
    notes.append("chat template: none, and no GLM role tokens; plain completion only")
    return None


def _stop_ids(header: Header, tokens: list[str], notes: list[str]) -> frozenset[int]:
    found: set[int] = set()
    listed = header.metadata.get(names.EOS_IDS)
    if isinstance(listed, list):
        found.update(i for i in listed if isinstance(i, int) and 0 <= i < len(tokens))
    for key in (names.EOS_ID, names.EOT_ID, names.EOM_ID):
        value = header.get_int(key)
        if value is not None and 0 <= value < len(tokens):
            found.add(value)
    if not isinstance(listed, list):
        wanted = set(names.STOP_TOKENS)
        by_name = {i: token for i, token in enumerate(tokens) if token in wanted}
        added = sorted(set(by_name) - found)
        found.update(by_name)
        if added:
            listing = ", ".join(f"{by_name[i]} ({i})" for i in added)
            notes.append(f"stop tokens: added {listing} by name, since the file has no eos list")
    return frozenset(found)


def _limits(tower: Header, notes: list[str]) -> VisionLimits:
    patch = tower.get_int(names.PATCH_SIZE)
    if patch is None or not 1 <= patch <= 256:
        raise GGUFError(f"{tower.path.name}: no usable patch size ({patch})")
    low, high = tower.get_int(names.MIN_PIXELS), tower.get_int(names.MAX_PIXELS)
    merge = tower.get_int(names.MERGE_SIZE)
    if merge is None:
        merge = GLM_MERGE_SIZE  # libmtmd's own default for this projector
    if not 1 <= merge <= _MAX_MERGE_SIZE:
        raise GGUFError(f"{tower.path.name}: no usable merge size ({merge})")
    if low is None or high is None or not 0 < low <= high or low > MOST_PIXELS:
        low, high = GLM_MIN_PIXELS, GLM_MAX_PIXELS
        notes.append(f"image limits: GLM-4.1V's ({low} to {high} pixels), the file has none to use")
    return VisionLimits(patch, merge, low, high)
