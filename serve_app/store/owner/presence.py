"""Whether an application is still being served, asked by what outlives its replicas."""

import asyncio

from ray.exceptions import ActorDiedError, RayError


async def is_served(app: str) -> bool:
    """Ask Serve's controller; while it does not answer the application counts as served."""
    try:
        return await asyncio.to_thread(_is_served, app)
    except ActorDiedError:
        return False
    except (RayError, TimeoutError):
        return True


def _is_served(app: str) -> bool:
    from ray import serve

    return app in serve.status().applications
