"""What a user can mend, said in one sentence."""


class InputError(ValueError):
    """Something in the parameters, the data or the model that was given cannot be used.

    In a notebook, and so in papermill's report of a failed run, it is shown as its one sentence without a traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]
