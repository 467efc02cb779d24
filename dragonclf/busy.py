"""What workers spend their time on, and what that says about what would make them faster."""

from pydantic import BaseModel, Field

HIGH, LOW = 0.75, 0.5  # shares of the time: busy enough to be what all else waits for; idle enough not to be


class Busy(BaseModel):
    """Seconds, summed over all workers; those of a thread pool also over its threads."""

    wall_s: float = Field(
        default=0.0, description="Of the workers, from the opening of each to the end of its last shard."
    )
    threads_s: float = Field(default=0.0, description="Of their decoding threads, idle or not.")
    fetch_s: float = Field(default=0.0, description="Of GETs under way, all together.")
    decode_s: float = Field(default=0.0, description="Of threads that decoded and transformed.")
    model_s: float = Field(default=0.0, description="In which the model ran.")
    num_bytes: int = Field(default=0, description="Of encoded images read.")

    def __add__(self, other: "Busy") -> "Busy":
        names = type(self).model_fields
        return Busy.model_validate({name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def decode(self) -> float:
        """Share of the decoding threads' time that they worked, 0 to 1."""
        return self.decode_s / self.threads_s if self.threads_s else 0.0

    @property
    def model(self) -> float:
        """Share of the workers' time that the model ran, 0 to 1."""
        return self.model_s / self.wall_s if self.wall_s else 0.0

    @property
    def num_fetches(self) -> float:
        """GETs under way in one worker, on average."""
        return self.fetch_s / self.wall_s if self.wall_s else 0.0

    def __str__(self) -> str:
        return f"decode {self.decode:.0%}, model {self.model:.0%}, {self.num_fetches:.0f} GETs a worker"

    @property
    def verdict(self) -> str:
        """What all else waited for, and what would help."""
        if not self.wall_s:
            return "nothing was read"
        if self.model >= HIGH and self.model >= self.decode:
            return f"the model (busy {self.model:.0%} of the time): GPUs, more workers, a lower precision or a smaller --arch would help"
        if self.decode >= HIGH:
            return (
                f"decoding (threads busy {self.decode:.0%} of the time): more CPUs a worker or more workers would help"
            )
        if self.model < LOW and self.decode < LOW:
            rate = self.num_bytes / self.wall_s / 2**20
            return f"the store ({rate:.1f} MiB/s and {self.num_fetches:.0f} GETs a worker, all else mostly idle): more workers would help"
        return "nothing alone: model, decoding and store are in balance; more workers would help"
