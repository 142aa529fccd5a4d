"""Attention within the sequences of a pack, forward and backward: the forms that this device has, and the padded one.

    python benchmarks/attention.py [--quick] [--images 8] [--heads 6] [--rounds 5]

The pack is that of a step: 2 x 197 and 8 x 37 tokens an image (224 and 96 px in patches of 16). `ours` is what the
network uses on this device; `rival` pads all sequences to the longest and masks the rest, in one call. The table has
the others as well: each group by the fused kernel of torch, or by two products and a softmax; nested jagged tensors.
"""

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import device, finish, line, seconds
from troodon.model.packing import Layout, attend, by_group, by_kernel, layout_of, unpack

# Shape suffixes: T tokens of the pack, N heads, H channels of each; B sequences of a group, L tokens of each.


def padded(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    lengths = torch.tensor(layout.lengths, device=q_TNH.device)
    there_BL = torch.arange(int(lengths.max()), device=q_TNH.device) < lengths[:, None]
    wide = []
    for x_TNH in (q_TNH, k_TNH, v_TNH):
        groups = [F.pad(x, (0, 0, 0, 0, 0, there_BL.shape[1] - x.shape[1])) for x in unpack(x_TNH, layout)]
        wide.append(torch.cat(groups).transpose(1, 2))
    return F.scaled_dot_product_attention(*wide, attn_mask=there_BL[:, None, None]).transpose(1, 2)[there_BL]


def dense(one: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """Group by group, with `one` on (B, N, L, H)."""

    def form(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
        groups = zip(*(unpack(x, layout) for x in (q_TNH, k_TNH, v_TNH)), strict=True)
        return torch.cat([one(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2).flatten(0, 1) for qkv in groups])

    return form


def products(q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor) -> Tensor:
    return (q_BNLH @ k_BNLH.mT * q_BNLH.shape[-1] ** -0.5).softmax(-1) @ v_BNLH


def jagged(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    starts = torch.tensor([0, *layout.lengths], device=q_TNH.device).cumsum(0)
    nested = [torch.nested.nested_tensor_from_jagged(x, starts).transpose(1, 2) for x in (q_TNH, k_TNH, v_TNH)]
    return F.scaled_dot_product_attention(*nested).transpose(1, 2).values()


FORMS = {
    "ours": attend, "padded": padded, "group by group": by_group, "fused kernel": dense(F.scaled_dot_product_attention),
    "products": dense(products), "jagged": jagged, "varlen": by_kernel,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 images, 3 rounds")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    images, rounds = (2, 3) if asked.quick else (asked.images, asked.rounds)
    layout, lines = layout_of(((2 * images, 197), (8 * images, 37)), device()), []
    for dtype in (torch.float32, torch.bfloat16):
        shape = (4, sum(layout.lengths), asked.heads, 64)
        q, k, v, gradient = torch.randn(shape, device=device(), dtype=dtype).unbind()
        given = [x.contiguous().requires_grad_() for x in (q, k, v)]

        def step(form: Callable, given: list[Tensor] = given, gradient: Tensor = gradient) -> Tensor:
            out_TNH = form(*given, layout)
            torch.autograd.grad(out_TNH, given, gradient)
            return out_TNH.detach()

        forms, expected = {}, step(by_group)
        for name, form in FORMS.items():
            try:
                torch.testing.assert_close(step(form).float(), expected.float(), rtol=0.05, atol=0.05)
                forms[name] = form
            except (AssertionError, NotImplementedError, RuntimeError, ImportError) as error:
                print(f"{name}, {dtype}: not here ({(str(error).splitlines() or [type(error)])[0]})", file=sys.stderr)
        took = dict(zip(forms, seconds([lambda f=f: step(f) for f in forms.values()], rounds), strict=True))
        print(f"{dtype}: " + ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in took.items()), file=sys.stderr)
        settings = {"images": images, "heads": asked.heads, "dtype": str(dtype)[6:], "seconds": took}
        lines.append(line("attention_time", took["ours"], took["padded"], "s", against="padded", **settings))
    finish(lines)


if __name__ == "__main__":
    main()
