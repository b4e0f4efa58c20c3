"""Model and schedule of a run without --config, from the text, the machine's speed and the user's settings.

rules          the choice, a pure function of facts
machine_speed  the facts' FLOP/s, measured in the first seconds of a run
size_run       gathers the facts, applies the rules, and lets the user's settings take precedence
base_model     the weights that --init-from base fine-tunes: how they are made, and whether they suit a text
"""
