"""Attention within the sequences of a pack, forward and backward: the forms this device supports, and padding.

    python benchmarks/attention.py [--quick] [--images 8] [--heads 6] [--rounds 5] [--record]

The pack is that of a step: 2 x 197 and 8 x 37 tokens an image (224 and 96 px in patches of 16). `ours` is the form that
the network uses on this device; `rival` pads all sequences to the longest and masks the rest, in one call. Times of the
other forms are printed, and stand in the settings: torch's fused kernel for each group, two products and a softmax for
each group, nested jagged tensors.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import argument_parser, device, finish, median_seconds, result
from troodon.model.packing import Layout, attend, by_group, by_kernel, layout_of, unpack

# Shape suffixes: T tokens of the pack, N heads, H channels of each; B sequences of a group, L tokens of each.


def padded(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    lengths = torch.tensor(layout.lengths, device=q_TNH.device)
    valid_BL = torch.arange(int(lengths.max()), device=q_TNH.device) < lengths[:, None]
    padded_qkv = []
    for x_TNH in (q_TNH, k_TNH, v_TNH):
        groups = [F.pad(x, (0, 0, 0, 0, 0, valid_BL.shape[1] - x.shape[1])) for x in unpack(x_TNH, layout)]
        padded_qkv.append(torch.cat(groups).transpose(1, 2))
    return F.scaled_dot_product_attention(*padded_qkv, attn_mask=valid_BL[:, None, None]).transpose(1, 2)[valid_BL]


def dense(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """Group by group, with `attention` on (B, N, L, H)."""

    def grouped(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
        groups = zip(*(unpack(x, layout) for x in (q_TNH, k_TNH, v_TNH)), strict=True)
        return torch.cat([attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2).flatten(0, 1) for qkv in groups])

    return grouped


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
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="2 images, 3 rounds")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    images, rounds = (2, 3) if arguments.quick else (arguments.images, arguments.rounds)
    layout, results = layout_of(((2 * images, 197), (8 * images, 37)), device()), []
    for dtype in (torch.float32, torch.bfloat16):
        shape = (4, sum(layout.lengths), arguments.heads, 64)
        q, k, v, gradient = torch.randn(shape, device=device(), dtype=dtype).unbind()
        inputs = [x.contiguous().requires_grad_() for x in (q, k, v)]

        def step(form: Callable, inputs: list[Tensor] = inputs, gradient: Tensor = gradient) -> Tensor:
            out_TNH = form(*inputs, layout)
            torch.autograd.grad(out_TNH, inputs, gradient)
            return out_TNH.detach()

        forms, expected = {}, step(by_group)
        for name, form in FORMS.items():
            try:
                torch.testing.assert_close(step(form).float(), expected.float(), rtol=0.05, atol=0.05)
                forms[name] = form
            except (AssertionError, NotImplementedError, RuntimeError, ImportError) as error:
                reason = (str(error).splitlines() or [type(error)])[0]
                print(f"{name}, {dtype}: not available ({reason})", file=sys.stderr)
        times = median_seconds([lambda f=f: step(f) for f in forms.values()], rounds)
        seconds = dict(zip(forms, times, strict=True))
        print(f"{dtype}: " + ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in seconds.items()), file=sys.stderr)
        settings = {"images": images, "heads": arguments.heads, "dtype": str(dtype)[6:], "seconds": seconds}
        times = seconds["ours"], seconds["padded"]
        results.append(result("attention_time", *times, "s", against="padded", **settings))
    finish(results, arguments)


if __name__ == "__main__":
    main()
