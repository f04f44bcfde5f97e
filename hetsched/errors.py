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
    """A device that is absent, or does not fit the request."""


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
