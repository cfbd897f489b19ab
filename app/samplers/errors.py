"""What can go wrong between us and a sampler, by what the caller should do about it.

SamplerError
├─ SamplerUnavailable   connection, protocol, deadline or 5xx: send a fresh request to a healthy engine
│  └─ SamplerGone       its row is gone: the keeper stopped or replaced it
├─ ModelNotServed       404 on the model: the adapter is not loaded (a restarted server has lost every one)
├─ SamplerRejected      400: the request is wrong and stays wrong; `param` names the field
└─ SamplerMisbehaved    an answer that breaks the protocol: nothing in it may be trained on

Does not cover: whether the served weights are the right ones, which the publication's proof decides.
"""


class SamplerError(Exception):
    """`url` is the sampler's base address, for the operator's log."""

    def __init__(self, message: str, *, url: str) -> None:
        super().__init__(f"{message} ({url})")
        self.url = url


class SamplerUnavailable(SamplerError):
    pass


class SamplerGone(SamplerUnavailable):
    def __init__(self, sampler_id: str) -> None:
        super().__init__("the sampler was stopped or replaced", url=sampler_id)


class ModelNotServed(SamplerError):
    pass


class SamplerRejected(SamplerError):
    def __init__(self, message: str, *, url: str, param: str | None) -> None:
        super().__init__(message, url=url)
        self.param = param


class SamplerMisbehaved(SamplerError):
    pass
