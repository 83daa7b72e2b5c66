"""``custom_keys`` that spare the parameters of the state space model from weight decay."""

ssm_no_decay = {
    "A_logs": dict(decay_mult=0.0),
    "Ds": dict(decay_mult=0.0),
    "dt_projs_bias": dict(decay_mult=0.0),
}
