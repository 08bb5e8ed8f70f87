"""How far an engine may be from its reference."""


class Tolerances:
    # Smallest share of (row, layer) on which record and teacher forcing agree.
    min_agreement = 1.0
    # How far a log-probability may be from teacher forcing's.
    logprob_tolerance = 1e-4
    # How far it may be from itself, the same request sampled again.
    again_tolerance = 0.0
