"""vLLM's scheduler, with the pictures of a step in the order of its prompts."""

from vllm.v1.core.sched.scheduler import Scheduler


class OrderedScheduler(Scheduler):
    """A step's batch takes new requests first, then those that begin again after the cache ran
    full; vLLM lists pictures as it chose the requests, which is the other way round.
    """

    def schedule(self, *args, **kwargs):
        """See Scheduler."""
        step = super().schedule(*args, **kwargs)
        order = [one.req_id for one in step.scheduled_new_reqs]
        order += step.scheduled_cached_reqs.req_ids
        pictures = step.scheduled_encoder_inputs
        step.scheduled_encoder_inputs = {name: pictures[name] for name in order if name in pictures}
        return step
