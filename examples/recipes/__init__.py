"""How each kind of trainer gets its routes: one module a trainer, see docs/trainers.md.

Each runs by itself, ``python -m examples.recipes.xtuner``: it serves `graphs.store` on a Ray of its
own, puts random routes, reads them as the trainer does, and checks that the framework's own
arithmetic gives the same.
"""
