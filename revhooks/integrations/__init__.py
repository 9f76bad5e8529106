"""Trainers of others: a callback each, over the public surface. Each file needs its library, and only that.

Lightning and Hugging Face's Trainer log the figures of the latest step that was read, under the names of `figures`::

    from revhooks.integrations.lightning import ReversibleCallback

    trainer = lightning.pytorch.Trainer(callbacks=[ReversibleCallback(replay=Block)])

    from revhooks.integrations.transformers import ReversibleCallback

    trainer = transformers.Trainer(..., callbacks=[ReversibleCallback(replay=GPT2Block)])

Where the loop is one's own nothing is needed but the context. Accelerate, with gradient accumulation and mixed precision as they
are::

    with accelerator.accumulate(model), revhooks.reversible() as run:
        accelerator.backward(loss_of(model(**batch)))
    accelerator.log({"revhooks/saved_bytes": run.stats.packed_bytes - run.stats.peak_held_bytes})

A script for ``torchrun``, DistributedDataParallel or FSDP: the same context around forward and backward, in every process, after
the model was wrapped; or unmodified, by ``revhooks run`` in place of ``python``::

    model = DistributedDataParallel(model)
    with revhooks.reversible():
        model(x).mean().backward()
"""

from __future__ import annotations

from ..record import Stats

__all__ = ["figures"]


def figures(stats: Stats) -> dict[str, float]:
    """What a trainer's logger is given.

    Example:
        >>> figures(Stats(packed_bytes=100, peak_held_bytes=30))
        {'revhooks/saved_bytes': 70.0, 'revhooks/peak_held_bytes': 30.0, 'revhooks/worst_error': 0.0}
    """
    return {
        "revhooks/saved_bytes": float(stats.packed_bytes - stats.peak_held_bytes),
        "revhooks/peak_held_bytes": float(stats.peak_held_bytes),
        "revhooks/worst_error": float(stats.worst_error),
    }
