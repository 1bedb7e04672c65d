"""The `hardware` table of a target, and the datasheet values of known GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from scaletune.errors import nearest
from scaletune.sections import Count, Positive, Section

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Gpu:
    """One GPU according to the datasheet of its vendor, without structured sparsity."""

    memory: float
    """Bytes; a datasheet's GB is taken as 1e9."""
    peak: float
    """FLOP/s, dense bfloat16."""
    memory_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """Bytes/s per GPU inside a node, both directions together."""
    source: str


# fmt: off
GPUS = {
    "H100": Gpu(80e9, 989.4e12, 3.35e12, 900e9,
                "NVIDIA H100 datasheet, SXM5 (1978.9 TFLOP/s there is with sparsity)"),
    "H200": Gpu(141e9, 989.4e12, 4.8e12, 900e9,
                "NVIDIA H200 datasheet, SXM (1979 TFLOP/s there is with sparsity)"),
    "B200": Gpu(180e9, 2250e12, 8.0e12, 1800e9,
                "NVIDIA HGX B200 datasheet (4.5 PFLOP/s there is with sparsity)"),
    "A100-80": Gpu(80e9, 312e12, 2.039e12, 600e9, "NVIDIA A100 datasheet, 80GB SXM"),
    "A100-40": Gpu(40e9, 312e12, 1.555e12, 600e9, "NVIDIA A100 datasheet, 40GB SXM"),
    "L40S": Gpu(48e9, 362.05e12, 0.864e12, 64e9,
                "NVIDIA L40S datasheet (PCIe Gen4 x16, no NVLink)"),
    "MI300X": Gpu(192e9, 1307.4e12, 5.3e12, 896e9,
                  "AMD Instinct MI300X data sheet (7 Infinity Fabric links of 128 GB/s)"),
}
# fmt: on
FLOAT32_PEAK = (
    "`hardware.peak_flops` must be given for precision 'float32': the known peaks are of bfloat16"
)

MFU = 0.4  # Llama 3 405B reached 0.38 to 0.43 on H100s (arXiv:2407.21783, table 4)
MFU_RANGE = (0.302, 0.462)  # Megatron-Turing NLG 530B to PaLM 540B (arXiv:2204.02311, table 3)


class Hardware(Section):
    """The GPUs that a target trains on: a known `gpu`, or its numbers.

    A number that is given replaces the one of the datasheet.
    """

    gpu: str | None = None
    """Name of a known GPU: H100, H200, B200, A100-80, A100-40, L40S or MI300X."""
    memory_gb: Positive | None = None
    """Memory per GPU in 1e9 bytes. Default: the datasheet's."""
    peak_flops: Positive | None = None
    """Dense peak FLOP/s per GPU at `precision`. Default: the datasheet's, in bfloat16."""
    memory_bandwidth: Positive | None = None
    """Memory bandwidth per GPU in bytes/s. Default: the datasheet's."""
    link_bandwidth: Positive | None = None
    """Bandwidth per GPU inside a node in bytes/s, both directions together. Default: the
    datasheet's."""
    gpus: Count = 1
    """Number of GPUs."""
    gpus_per_node: Count = 8
    """GPUs per node. `gpus` must be a multiple if it is larger."""
    mfu: float | list[float] | None = None
    """Model FLOPs utilisation, above 0 and at most 1, or a range [low, high]. Default: 0.4, with
    the range 0.302 to 0.462."""
    calibration: str | None = None
    """A fit file of law `seconds_per_step` to records of such GPUs. It replaces `mfu`."""
    precision: Literal["mixed", "autocast", "float32"] = "mixed"
    """Number formats. mixed: bfloat16 with float32 master weights; autocast: float32 weights and
    bfloat16 activations; float32: all in float32."""
    zero: Literal[0, 1] = 1
    """ZeRO stage. 1: data-parallel GPUs share the optimizer states (arXiv:1910.02054)."""
    recompute: bool = False
    """Whether the backward pass recomputes the activations of every layer."""
    usable: Share = 0.9
    """Share of the memory that training can use. The rest is for the context, communication buffers
    and fragmentation; 0.9 is assumed, not measured."""

    @model_validator(mode="after")
    def _known(self) -> Hardware:
        if self.gpu is not None and self.gpu not in GPUS:
            raise ValueError(
                "`hardware.gpu` must be a known GPU, or give its numbers instead, but got"
                f" {self.gpu!r}{nearest(self.gpu, GPUS)}"
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
                "`gpus % gpus_per_node == 0` must hold, but got"
                f" gpus={self.gpus}, gpus_per_node={self.gpus_per_node}"
            )
        ends = (
            self.mfu if isinstance(self.mfu, list) else [MFU if self.mfu is None else self.mfu] * 2
        )
        if len(ends) != 2 or not 0 < ends[0] <= ends[1] <= 1:
            raise ValueError(
                "`hardware.mfu` must be above 0 and at most 1, or such a [low, high], but got"
                f" {self.mfu}"
            )
        if self.calibration and self.mfu is not None:
            raise ValueError(
                "`hardware` takes `mfu` or a `calibration` that measures it, but got both"
            )
        return self

    def gpu_spec(self) -> Gpu:
        """The datasheet values, replaced by those given here; an unknown bandwidth is 0."""
        sheet = GPUS.get(self.gpu or "", Gpu(0.0, 0.0, 0.0, 0.0, "given in the target"))
        names = ("memory_gb", "peak_flops", "memory_bandwidth", "link_bandwidth")
        given = [name for name in names if getattr(self, name)]
        override = f"; {', '.join(given)} as given in the target" if self.gpu and given else ""
        return Gpu(
            self.memory_gb * 1e9 if self.memory_gb else sheet.memory,
            self.peak_flops or sheet.peak,
            self.memory_bandwidth or sheet.memory_bandwidth,
            self.link_bandwidth or sheet.link_bandwidth,
            sheet.source + override,
        )

    def utilisation(self) -> tuple[float, float, float, str]:
        """(MFU, lowest, highest, source)."""
        if self.mfu is None:
            source = (
                "assumed: Llama 3 405B reached 0.38 to 0.43 (arXiv:2407.21783), others 0.302 to"
                " 0.462 (arXiv:2204.02311)"
            )
            return MFU, *MFU_RANGE, source
        low, high = self.mfu if isinstance(self.mfu, list) else (self.mfu, self.mfu)
        return (low * high) ** 0.5, low, high, "given in the target"
