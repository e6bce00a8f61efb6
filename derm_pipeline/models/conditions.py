"""What a network is told of an image: classes, each with a null class for "not told", and cached text embeddings.

A *condition* is one named thing that is told. Its value is a class index (n,), the null class being the number of
classes; or, for `TEXT`, embeddings (n, s, e) of s text tokens with a mask (n, s) under `TEXT_MASK`, where a row of
nothing but False is the null. So everything that hides a condition, in training or for guidance, swaps in nulls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from derm_pipeline.records import AgeBand, Diagnosis, Sex, Site, SkinType

TEXT = "text"
"""The condition that is told as embeddings: float (n, s, e), s = `text_tokens`, e = `text_width`."""
TEXT_MASK = "text_mask"
"""Which tokens of `TEXT` there are: bool (n, s), True where there is one."""
POOLED = "pooled"
"""What a text encoder makes of the whole text, of pretrained networks that are told it besides: float (n, p)."""
TEXT_PARTS = (TEXT, TEXT_MASK, POOLED)
"""All that is told of a text: hidden and guided by together, under the name `TEXT`."""
SIZE = "size"
"""Sizes in pixels that some pretrained networks are told, float (n, 6): height and width of the image before it was
cropped, top and left of the crop, height and width of the result. Never hidden."""

VOCABULARIES: dict[str, tuple[str, ...]] = {
    "skin_type": tuple(str(skin_type.value) for skin_type in SkinType),
    "sex": tuple(Sex),
    "age_band": tuple(AgeBand),
    "site": tuple(Site),
}
"""The conditions whose classes are the same in every recipe; those of the diagnosis are the training set's."""


def condition_classes(names: Sequence[str], diagnoses: Sequence[Diagnosis]) -> dict[str, tuple[str, ...]]:
    """The classes of each of these conditions, in order; the null class follows them.

    Raises:
        ValueError: a name that is no condition, with those there are.
    """
    known = {"diagnosis": tuple(diagnosis.value for diagnosis in diagnoses)} | VOCABULARIES
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no condition {unknown[0]!r}; there are {', '.join(known)}")
    return {name: tuple(str(value) for value in known[name]) for name in names}


def check_classes(told: Mapping[str, Tensor], conditions: Mapping[str, int]) -> None:
    """Refuse class indices that are no row of their table, before a device stumbles over them. Reads every value.

    Args:
        told: Class indices (n,), integers, by condition.
        conditions: Number of classes by condition; the null class is that number.

    Raises:
        ValueError: a condition is missing, is not integer, or lies outside its range: which, where and what is allowed.
    """
    for name, num_classes in conditions.items():
        if name not in told:
            raise ValueError(f"nothing is told of {name}; an unknown value is the null class, {num_classes}")
        classes = told[name]
        if classes.ndim != 1 or classes.is_floating_point():
            raise ValueError(f"{name} is {classes.dtype} {tuple(classes.shape)}: class indices (n,) are needed")
        wrong = ((classes < 0) | (classes > num_classes)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"{name} is {int(classes[row])} in row {row} (and {len(wrong) - 1} more are out of range): 0 to "
                f"{num_classes - 1} are its classes and {num_classes} is its null class"
            )


def draw_hidden(
    names: Sequence[str], num: int, stream: torch.Generator, *, together: float, each: float | Mapping[str, float] = 0.0
) -> dict[str, Tensor]:
    """Which conditions are hidden in which of `num` rows: bool (num,) by name, drawn on the CPU.

    Args:
        names: The conditions, in the order in which chance is drawn for them.
        num: Rows.
        stream: A CPU generator; one draw for all together, then one for each condition that can be hidden by itself.
        together: Chance that a row's conditions are all hidden: what guidance by all of them needs.
        each: Chance that a condition is hidden by itself, for all or by name: what guidance by some of them needs.
    """
    all_hidden = torch.rand(num, generator=stream) < together
    chances = each if isinstance(each, Mapping) else dict.fromkeys(names, each)
    unknown = sorted(chances.keys() - set(names))
    if unknown:
        raise ValueError(f"{unknown[0]!r} cannot be hidden: the conditions are {', '.join(names)}")
    hidden = {}
    for name in names:
        chance = chances.get(name, 0.0)
        alone = torch.rand(num, generator=stream) < chance if chance else False
        hidden[name] = all_hidden | alone
    return hidden


def hide(told: Mapping[str, Tensor], null: Mapping[str, Tensor], hidden: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is told, with nulls in the rows in which a condition is hidden.

    Args:
        told: By condition, of n rows.
        null: A network's `null_conditions(n)`.
        hidden: bool (n,) by condition, True where it is hidden; a condition that is not named is not hidden.

    Raises:
        ValueError: a condition is to be hidden that is not told.
    """
    unknown = sorted(hidden.keys() - told.keys())
    if unknown:
        raise ValueError(f"{unknown[0]!r} cannot be hidden: told are {', '.join(told)}")
    result = dict(told)
    for name, rows in hidden.items():
        for key in [part for part in TEXT_PARTS if part in told] if name == TEXT else [name]:
            value = told[key]
            is_null = rows.to(value.device).view(-1, *[1] * (value.ndim - 1))
            result[key] = torch.where(is_null, null[key].to(value.device, value.dtype), value)
    return result


class ConditionEmbedder(nn.Module):
    """Class indices (n,) to features (n, d); the last row of the table is the null class."""

    def __init__(self, num_classes: int, width: int, init_std: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=init_std)

    def forward(self, classes: Tensor) -> Tensor:
        return self.embedding_table(classes)


class TextEmbedder(nn.Module):
    """Text embeddings (n, s, e) to tokens (n, s, d) that can be attended to, and pooled to features (n, d).

    Pooling is attention by one learned query: each text weighs its own tokens. A row without any token is given one,
    `null`, which is learned. The pooled features start with deviation `init_std`, like a table of classes.
    """

    def __init__(self, text_width: int, width: int, heads: int, init_std: float) -> None:
        super().__init__()
        self.heads = heads
        self.null = nn.Parameter(torch.empty(text_width))
        self.norm = nn.LayerNorm(text_width)
        self.proj = nn.Linear(text_width, width)
        self.query = nn.Parameter(torch.empty(width))
        self.kv = nn.Linear(width, 2 * width)
        self.out_norm = nn.LayerNorm(width)
        nn.init.normal_(self.null, std=0.02)
        nn.init.normal_(self.query)
        for linear in (self.proj, self.kv):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.out_norm.weight, init_std)

    def forward(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns pooled features (n, d), tokens (n, s, d), and their mask (n, s) with at least one True a row."""
        is_first = torch.arange(text.shape[1], device=text.device) == 0
        takes_null = is_first & ~mask.any(1, keepdim=True)  # (n, s)
        text = torch.where(mask[..., None], text.to(self.null.dtype), 0)  # whatever stands where no token is
        text = torch.where(takes_null[..., None], self.null, text)
        mask = mask | takes_null
        tokens = self.proj(self.norm(text))
        k, v = self.kv(tokens).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (n, heads, s, d / heads)
        q = self.query.to(v.dtype).view(1, self.heads, 1, -1).expand(len(text), -1, -1, -1)
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.out_norm(pooled.flatten(1)), tokens, mask
