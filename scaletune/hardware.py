"""The `hardware` table of a target: which GPUs, how many, how well used; and what vendors' datasheets say of GPUs by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from scaletune.errors import nearest
from scaletune.sections import Count, Positive, Section

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Gpu:
    """One GPU by its vendor's datasheet: dense peaks, no structured sparsity."""

    memory: float  # bytes; a datasheet's GB is taken as 1e9
    peak: float  # FLOP/s, dense bfloat16
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s a GPU inside a node, both directions together
    source: str


GPUS = {
    "H100": Gpu(
        80e9,
        989.4e12,
        3.35e12,
        900e9,
        "NVIDIA H100 datasheet, SXM5 (1978.9 TFLOP/s there is with sparsity)",
    ),
    "H200": Gpu(
        141e9,
        989.4e12,
        4.8e12,
        900e9,
        "NVIDIA H200 datasheet, SXM (1979 TFLOP/s there is with sparsity)",
    ),
    "B200": Gpu(
        180e9,
        2250e12,
        8.0e12,
        1800e9,
        "NVIDIA HGX B200 datasheet (4.5 PFLOP/s there is with sparsity)",
    ),
    "A100-80": Gpu(80e9, 312e12, 2.039e12, 600e9, "NVIDIA A100 datasheet, 80GB SXM"),
    "A100-40": Gpu(40e9, 312e12, 1.555e12, 600e9, "NVIDIA A100 datasheet, 40GB SXM"),
    "L40S": Gpu(
        48e9, 362.05e12, 0.864e12, 64e9, "NVIDIA L40S datasheet (PCIe Gen4 x16, no NVLink)"
    ),
    "MI300X": Gpu(
        192e9,
        1307.4e12,
        5.3e12,
        896e9,
        "AMD Instinct MI300X data sheet (7 Infinity Fabric links of 128 GB/s)",
    ),
}
FLOAT32_PEAK = (
    "`hardware.peak_flops` must say the peak of precision 'float32': the table has that of bfloat16"
)

MFU = 0.4  # Llama 3 405B reached 0.38 to 0.43 of H100s (arXiv:2407.21783, table 4)
MFU_RANGE = (0.302, 0.462)  # Megatron-Turing NLG 530B to PaLM 540B (arXiv:2204.02311, table 3)


class Hardware(Section):
    """What a target is to be trained on; reads the table by `gpu`, or takes numbers, which go over the table's."""

    gpu: str | None = None
    memory_gb: Positive | None = None  # 1e9 bytes a GPU
    peak_flops: Positive | None = None  # FLOP/s a GPU, dense, at `precision`
    memory_bandwidth: Positive | None = None  # bytes/s a GPU
    link_bandwidth: Positive | None = None  # bytes/s a GPU inside a node, both directions together
    gpus: Count = 1
    gpus_per_node: Count = 8
    mfu: float | list[float] | None = None  # model FLOPs over peak; [low, high]: a range
    calibration: str | None = (
        None  # a fit of `seconds_per_step` to records of such GPUs: in place of `mfu`
    )
    precision: Literal["mixed", "autocast", "float32"] = (
        "mixed"  # see `scaletune.counting.memory.PRECISIONS`
    )
    zero: Literal[0, 1] = (
        1  # 1: optimizer states are spread over the data-parallel GPUs (arXiv:1910.02054)
    )
    recompute: bool = False  # every layer's activations again in the backward pass
    usable: Share = 0.9  # of the memory; what a context, collectives' buffers and fragmentation leave: assumed, not measured

    @model_validator(mode="after")
    def _known(self) -> Hardware:
        if self.gpu is not None and self.gpu not in GPUS:
            raise ValueError(
                f"`hardware.gpu` must be one we know, or numbers in its place, but got {self.gpu!r}{nearest(self.gpu, GPUS)}"
            )
        if self.gpu is None and None in (self.memory_gb, self.peak_flops):
            raise ValueError(
                f"`hardware` needs `gpu` ({', '.join(GPUS)}), or `memory_gb` and `peak_flops`"
            )
        if self.precision == "float32" and self.peak_flops is None:
            raise ValueError(FLOAT32_PEAK)
        return self

    @model_validator(mode="after")
    def _sound(self) -> Hardware:
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"`gpus % gpus_per_node == 0` must hold, but got gpus={self.gpus}, gpus_per_node={self.gpus_per_node}"
            )
        ends = (
            self.mfu if isinstance(self.mfu, list) else [MFU if self.mfu is None else self.mfu] * 2
        )
        if len(ends) != 2 or not 0 < ends[0] <= ends[1] <= 1:
            raise ValueError(
                f"`hardware.mfu` must be above 0 and at most 1, or such a [low, high], but got {self.mfu}"
            )
        if self.calibration and self.mfu is not None:
            raise ValueError(
                "`hardware` takes `mfu` or a `calibration` that measures it, but got both"
            )
        return self

    def resolved(self) -> Gpu:
        """The GPU: the table's, with the numbers given here over it; a bandwidth that nobody says is 0."""
        told = GPUS.get(self.gpu or "", Gpu(0.0, 0.0, 0.0, 0.0, "given in the target"))
        given = [
            name
            for name in ("memory_gb", "peak_flops", "memory_bandwidth", "link_bandwidth")
            if getattr(self, name)
        ]
        source = told.source + (
            f"; {', '.join(given)} as given in the target" if self.gpu and given else ""
        )
        return Gpu(
            self.memory_gb * 1e9 if self.memory_gb else told.memory, self.peak_flops or told.peak,
            self.memory_bandwidth or told.memory_bandwidth, self.link_bandwidth or told.link_bandwidth, source,
        )  # fmt: skip

    def utilisation(self) -> tuple[float, float, float, str]:
        """(MFU, lowest, highest, why)."""
        if self.mfu is None:
            return (
                MFU,
                *MFU_RANGE,
                "assumed: Llama 3 405B reached 0.38 to 0.43 (arXiv:2407.21783), others 0.302 to 0.462 (arXiv:2204.02311)",
            )
        low, high = self.mfu if isinstance(self.mfu, list) else (self.mfu, self.mfu)
        return (low * high) ** 0.5, low, high, "given in the target"
