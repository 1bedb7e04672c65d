"""Lists stacks that cannot hold a transferred plan, and formats that need `force`."""

PYTORCH = "emit 'pytorch' and use loader.py's groups in your own training loop"
UNSUPPORTED = {
    "gpt-neox": (
        "at ea7aefd8 its annealer writes one lr into every group and its MuAdam uses coupled L2;"
        f" {PYTORCH}"
    ),
    "nanotron": (
        "at 2411b022 `use_mup` multiplies Adam's lr by fan_out / fan_in, so the lr of square"
        f" matrices does not scale with width; {PYTORCH}"
    ),
    "litgpt": f"0.5.13 writes one computed lr into every param group at each step; {PYTORCH}",
    "levanter": (
        "at 9263f81e its optimizers take no lr per parameter (adamh takes two, for matrices and for"
        f" the rest); {PYTORCH}"
    ),
    "open_lm": f"at 9bb92ef1 it has no multipliers and one lr; {PYTORCH}",
    "lingua": f"it has no multipliers and one lr; {PYTORCH}",
}
"""Stack -> why it is not supported at the commit that was read, and what to do instead."""

UNTESTED = {
    "minicpm3": "multi-head latent attention",
    "falcon_h1": "a Mamba mixer beside the attention",
}
"""Format -> the part of its architecture that no proxy can have."""
