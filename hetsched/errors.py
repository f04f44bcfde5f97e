"""The errors that a user of hetsched can meet.

Each message names the thing, what was found and what would do; the command line prints it as one
line and exits with `exit_status`.
"""


class HetschedError(Exception):
    """Anything that hetsched refuses to do, said in one line."""

    exit_status = 1


class ModelError(HetschedError):
    """The model file cannot be read as an ONNX model that hetsched serves."""


class UnsupportedOperation(HetschedError):
    """An operation that no device at hand can run."""


class DeviceError(HetschedError):
    """A device that is absent, fails, or does not fit the request.

    `device` is its name, where it is known, which the message then has; who allows it goes on
    without (`Plan.without`).
    """

    def __init__(self, message: str, device: str = "") -> None:
        super().__init__(message)
        self.device = device

    def __str__(self) -> str:
        message = super().__str__()
        return message if self.device in message else f"'{self.device}': {message}"

    def of(self, device: str) -> "DeviceError":
        """The same error, which comes from `device` if it does not say where it comes from."""
        self.device = self.device or device
        return self


class BuildError(DeviceError):
    """A device whose own compiler refuses a kernel."""


class OutOfMemory(DeviceError):
    """A device that cannot hold what it is given."""


class DeviceLost(DeviceError):
    """A device that stopped working while it was used."""


class PluginError(HetschedError):
    """An extension that does not exist, or an option that it does not have."""


class PlanError(HetschedError):
    """A plan that does not fit its graph or its system."""


class SplitRefused(PlanError):
    """A split that its operations do not allow; the message has the operation and the axis."""


class InfeasiblePlan(PlanError):
    """No plan satisfies the limits of the devices."""


class InstanceError(HetschedError):
    """A scheduling instance that does not say what an instance says."""


class PackageError(HetschedError):
    """A package that is damaged, foreign or too new."""


class InputError(HetschedError):
    """Input arrays that do not fit the model."""


class OutputFileError(HetschedError):
    """A file that could not be written; the old one, if any, is untouched."""


class CompileError(HetschedError):
    """A target refused a part; the message has the part's name."""


class RefusedPart(CompileError):
    """A part that a target did not compile, by its name in the plan."""

    def __init__(self, part: str, device: str, reason: str) -> None:
        super().__init__(f"{part} on '{device}': {reason}")
        self.part = part
        self.device = device
        self.reason = reason


class PartError(HetschedError):
    """A part failed while it ran; the message has the part's name."""


class VerificationFailed(HetschedError):
    """A result that deviates from ONNX Runtime by more than its tolerance."""

    exit_status = 3


class LimitExceeded(HetschedError):
    """A limit that the user asked for (time, speed, memory) was not met."""

    exit_status = 4


def device_failure(error: BaseException) -> DeviceError | None:
    """What `error` says of a device that has a name: itself, or what caused it."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, DeviceError) and found.device:
            return found
        found = found.__cause__
    return None
