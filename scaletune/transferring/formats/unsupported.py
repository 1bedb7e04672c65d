"""Stacks that cannot hold a transferred plan: why not, and what to do instead. Read at the commits named. And those to be forced."""

PYTORCH = "emit 'pytorch' and give loader.py's groups to your own loop"
REFUSED = {
    "gpt-neox": f"at ea7aefd8 its annealer writes one lr into every group and its MuAdam has coupled L2; {PYTORCH}",
    "nanotron": f"at 2411b022 `use_mup` multiplies Adam's lr by fan_out / fan_in, so square matrices are not scaled at all; {PYTORCH}",
    "litgpt": f"0.5.13 writes one computed lr into every param group at each step; {PYTORCH}",
    "levanter": f"at 9263f81e its optimizers take no lr by parameter (adamh has two, for matrices and the rest); {PYTORCH}",
    "open_lm": f"at 9bb92ef1 it has no multipliers and one lr; {PYTORCH}",
    "lingua": f"it has no multipliers and one lr; {PYTORCH}",
}
UNPROVEN = {  # format -> what no proxy of ours can have
    "minicpm3": "multi-head latent attention", "falcon_h1": "a Mamba mixer beside the attention",
}  # fmt: skip
