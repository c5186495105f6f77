"""What adapters of any kind change of a layer's weight, computed in float32 from their factors.

LoRA (Hu et al. 2021, arXiv 2106.09685), LoHa and LoKr (Yeh et al. 2023, LyCORIS, arXiv 2309.14859), each also with a
core between its factors (Tucker), and DoRA (Liu et al. 2024, arXiv 2402.09353) on top of any of them. Factors have the
names that kohya's scripts and LyCORIS gave them; Δ is a matrix (out, in · kernel), scaled by alpha / rank:

LoRA: lora_up lora_down. LoHa: (hada_w1_a hada_w1_b) ∘ (hada_w2_a hada_w2_b). LoKr: lokr_w1 ⊗ lokr_w2, either of them
whole or the product of its `_a` and `_b`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

LORA, LOHA = {"lora_up", "lora_down"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
W1, W2 = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
LOKR = [w1 | w2 for w1 in W1 for w2 in (*W2, W2[1] | {"lokr_t2"})]
# By kind: which factors an update has, and the one whose rows are its rank.
KINDS = {
    "LoRA": ((LORA, LORA | {"lora_mid"}), ("lora_down",)),
    "LoHa": ((LOHA, LOHA | {"hada_t1", "hada_t2"}), ("hada_w1_b",)),
    "LoKr": (LOKR, ("lokr_w1_b", "lokr_w2_b")),
}
FACTORS = tuple(sorted({name for sets, _ in KINDS.values() for names in sets for name in names}))


@dataclass(frozen=True)
class Update:
    """What one adapter changes of one layer's weight.

    factors: by the names above. alpha: of the scale alpha / rank, or with `rslora` alpha / sqrt(rank) (arXiv
    2312.03732); None is the rank. magnitude: DoRA's, (out, 1, …) or (1, in, …) with the weight's dimensions.
    """

    factors: Mapping[str, Tensor]
    alpha: float | None = None
    rslora: bool = False
    magnitude: Tensor | None = None

    @property
    def kind(self) -> str:
        """LoRA, LoHa or LoKr; ValueError for factors that make none of them."""
        for kind, (sets, _) in KINDS.items():
            if set(self.factors) in sets:
                return kind
        raise ValueError(f"{' and '.join(sorted(self.factors)) or 'no factors'} make no LoRA, LoHa or LoKr")

    @property
    def rank(self) -> int | None:
        """None for a LoKr of two whole factors, which has none."""
        _, rows = KINDS[self.kind]
        return next((len(self.factors[name]) for name in rows if name in self.factors), None)

    @property
    def scale(self) -> float:
        """By which the factors' product is multiplied; a LoKr of two whole factors ignores alpha."""
        if self.rank is None or (self.alpha is None and not self.rslora):
            return 1.0
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def scaled(self) -> "Update":
        """The same of a LoRA whose scale is 1, its factors having it already."""
        factors = {**self.factors, "lora_up": self.scale * self.factors["lora_up"]}
        return replace(self, factors=factors, alpha=None, rslora=False)

    def matrix(self, device: torch.device | str) -> Tensor:
        """The scaled product (out, in · kernel) of the factors, in float32 on `device`."""
        kind, f = self.kind, {name: x.to(device, torch.float32) for name, x in self.factors.items()}
        if kind == "LoRA":
            up = f["lora_up"].flatten(1)
            delta = product(up.T if "lora_mid" in f else up, f["lora_down"], f.get("lora_mid"))
        elif kind == "LoHa":
            w1, w2 = (product(f[f"hada_w{i}_a"], f[f"hada_w{i}_b"], f.get(f"hada_t{i}")) for i in "12")
            delta = w1 * w2
        else:
            w1 = f["lokr_w1"] if "lokr_w1" in f else product(f["lokr_w1_a"], f["lokr_w1_b"])
            w2 = f["lokr_w2"] if "lokr_w2" in f else product(f["lokr_w2_a"], f["lokr_w2_b"], f.get("lokr_t2"))
            delta = torch.kron(w1, w2.flatten(1))  # columns: w1's inputs, then w2's, then the kernel
        return self.scale * delta

    def check(self, shape: tuple[int, ...], inputs: int) -> None:
        """ValueError unless it fits a weight of this shape, or that weight's first `inputs` inputs; nothing of the
        layer's size is made to find out."""
        kernel, flat = tuple(shape[2:]), math.prod(shape[2:])
        for name, x in self.factors.items():
            beyond = tuple(x.shape[2:])
            fits = beyond in ((), kernel) or set(beyond) == {1}
            if not x.is_floating_point() or x.ndim < 2 or not x.numel() or not fits:
                raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)} for the weight {shape}")
        largest = max(shape[0], shape[1] * flat)
        if (self.rank or 1) > largest:
            raise ValueError(f"its rank is {self.rank}, and the weight {shape} allows at most {largest}")
        on_meta = {name: torch.empty(x.shape, device="meta") for name, x in self.factors.items()}
        try:
            found = list(replace(self, factors=on_meta).matrix("meta").shape)
        except (RuntimeError, IndexError):
            found = []
        if found not in [[shape[0], n * flat] for n in (shape[1], inputs)]:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in self.factors.items())
            raise ValueError(f"{shapes} for the weight {shape}")
        if (m := self.magnitude) is not None:
            columns = found[1] // flat
            by_axis = [(shape[0], *[1] * (len(shape) - 1)), (1, columns, *[1] * (len(shape) - 2))]
            if not m.is_floating_point() or tuple(m.shape) not in by_axis:
                raise ValueError(f"DoRA's magnitude is {tuple(m.shape)} for the weight {shape}, not {by_axis[0]}")

    def difference(self, weight: Tensor) -> Tensor:
        """W' - W in float32 for a weight (out, in, …): Δ, or of DoRA m (W + Δ) / ‖W + Δ‖ - W with the norm over the
        axes along which m is 1. Inputs that the adapter does not have keep their weights."""
        delta = self.matrix(weight.device)
        part = weight.detach()[:, : delta.shape[1] // math.prod(weight.shape[2:])].float()
        delta = delta.view_as(part)
        if self.magnitude is not None:
            m, adapted = self.magnitude.to(delta), part + delta
            norm = torch.linalg.vector_norm(adapted, dim=[i for i, n in enumerate(m.shape) if n == 1], keepdim=True)
            delta = m * adapted / norm.clamp_min(torch.finfo(torch.float32).eps) - part
        return F.pad(delta, [0, 0] * (weight.ndim - 2) + [0, weight.shape[1] - part.shape[1]])


def product(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """a b, a matrix, of a (out, r) and b (r, in, …); with a core (r, r, …) Σ core[i, j] a[i] b[j] of a (r, out)."""
    if core is None:
        return a @ b.flatten(1)
    return torch.einsum("ijk,jn,im->mnk", core.flatten(2), b.flatten(1), a).flatten(1)
