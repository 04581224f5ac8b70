"""DINO (Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers"), its loss attached to a chosen readout."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from jaxtyping import Float
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.data.transforms import normalise
from ssl_vit.data.views import Batch, MultiCrop, multi_crop
from ssl_vit.errors import UsageError, check_numbers
from ssl_vit.methods.base import Method, at_least_float32
from ssl_vit.methods.head import Head, HeadConfig
from ssl_vit.methods.optim import OptimConfig, clip_each
from ssl_vit.methods.schedules import cosine, linear
from ssl_vit.model.backbone import Backbone, build_backbone
from ssl_vit.model.compiler import fusible, fusing
from ssl_vit.model.config import BackboneConfig
from ssl_vit.model.readout import Readout, ReadoutSpec
from ssl_vit.weights.checkpoint import start_from

log = logging.getLogger(__name__)

COLLAPSED, COLLAPSED_STEPS = 1e-3, 50  # the teacher's information, in units of ln k, and how long it may be below


def teacher_targets(teacher: Float[Tensor, "t b k"], center: Float[Tensor, " k"], temperature: float) -> Float[Tensor, "t b k"]:
    """Equation 1 with centring and sharpening: softmax((g_t - c) / temperature)."""
    return F.softmax((teacher - center) / temperature, dim=-1)


@fusible
def dino_loss(targets: Float[Tensor, "t b k"], student: Float[Tensor, "v b k"], temperature: float) -> Float[Tensor, ""]:
    """Equation 3: cross-entropy between teacher view i and student view j, mean over the pairs i != j and the batch.

    The first t student views are the teacher's views, in the same order. In float32 or better whatever the precision of the run: matrix
    products would be rounded to bfloat16 under autocast and to TF32 on a GPU, so there is none; and prototypes are summed first, as one
    sum over all is off by 1e-3."""
    log_probs = F.log_softmax(at_least_float32(student) / temperature, dim=-1)
    pairs = torch.stack([-(target * log_probs).sum(dim=-1).mean(dim=-1) for target in targets])  # [t v]
    t, v = pairs.shape
    loss: Tensor = (pairs.sum() - pairs.diagonal().sum()) / (t * v - min(t, v))
    return loss


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher (section 3.1) and its sharpening and centring.

    Args:
        momentum: of the moving average at the first step; cosine to 1.
        temperature: teacher temperature after its warm-up.
        warmup_temperature: teacher temperature at the first step.
        warmup_epochs: epochs of the temperature's linear warm-up.
        center_momentum: of the centre's moving average.
    """

    momentum: float = 0.996
    temperature: float = 0.04
    warmup_temperature: float = 0.04
    warmup_epochs: float = 0.0
    center_momentum: float = 0.9

    def __post_init__(self) -> None:
        check_numbers("teacher.", vars(self), momentum=ClosedUnitInterval, center_momentum=ClosedUnitInterval)
        check_numbers("teacher.", vars(self), temperature=PositiveFloat, warmup_temperature=PositiveFloat, warmup_epochs=NonNegativeFloat)


class Network(nn.Module):
    """Student or teacher: backbone, readout, head."""

    def __init__(self, backbone: Backbone, spec: ReadoutSpec, head: HeadConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = Head(spec.width(backbone.width), head)
        self.readout = Readout(spec, backbone.width)  # drawn last, so that what the arms of a study share starts the same
        if not spec.uses_norm:  # nothing reads it, so nothing would train it
            backbone.norm.requires_grad_(False)

    def forward(self, images: Float[Tensor, "v b 3 s s"], draws: Float[Tensor, "vb depth n"] | None = None) -> Float[Tensor, "v b k"]:
        """draws: of drop path, as `Backbone` takes them."""
        tokens = self.backbone(images.flatten(0, 1), blocks=self.readout.spec.blocks, draws=draws)
        logits: Tensor = self.head(self.readout(tokens))
        return logits.view(*images.shape[:2], -1)


class DINO(Method):
    """Self-distillation without labels.

    Args:
        readout: the spec (cls, gap, register, ...) whose vector goes into the head; the same for student and teacher.
        backbone: the ViT; drop_path applies to the student only.
        head: the projection head.
        crops: the two global and the local views.
        teacher: moving average, temperature and centre.
        student_temperature: temperature of the student's softmax.
        clip_grad: bound of each parameter's gradient norm, 0 for none.
        optim: AdamW.
        seed: of the weights, the views and the order of the data.
        init: any source of `load_backbone` that student and teacher start from; head and learned readout start fresh.
    """

    name = "dino"
    ramp_offset = 1  # the official table of learning rates reaches the base rate one step before the warm-up ends
    default_optim = OptimConfig(lr=5e-4, min_lr=1e-6, warmup_epochs=10.0, weight_decay=0.04, weight_decay_end=0.4)

    def __init__(
        self,
        readout: str = "cls",
        backbone: BackboneConfig = BackboneConfig(drop_path=0.1),
        head: HeadConfig = HeadConfig(),
        crops: MultiCrop = MultiCrop(),
        teacher: TeacherConfig = TeacherConfig(),
        student_temperature: float = 0.1,
        clip_grad: float = 3.0,
        optim: OptimConfig = default_optim,
        seed: int = 0,
        init: str | None = None,
    ) -> None:
        super().__init__(locals())
        check_numbers("", locals(), student_temperature=PositiveFloat, clip_grad=NonNegativeFloat)
        if crops.global_size != backbone.image_size:
            raise UsageError(f"crops.global_size is {crops.global_size}, backbone.image_size {backbone.image_size}; set both to the same")
        if crops.n_local and crops.local_size % backbone.patch:
            raise UsageError(f"crops.local_size {crops.local_size} is not divisible by backbone.patch {backbone.patch}; change one of them")
        self.head_config, self.crops, self.teacher_config = head, crops, teacher
        self.student_temperature, self.clip_grad, self.crop_plan = student_temperature, clip_grad, crops.plan
        trained = build_backbone(backbone)
        self.check_readout(trained)
        self.student = Network(trained, self.spec, head)
        if init is not None:
            start_from(self.backbone, init)
        self.teacher = Network(build_backbone(backbone, drop_path=0.0), self.spec, head)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.center = nn.Buffer(torch.zeros(head.prototypes))
        self.batch_center = nn.Buffer(torch.zeros(head.prototypes), persistent=False)  # of the micro-batches so far
        self.old_center = nn.Buffer(torch.zeros(head.prototypes), persistent=False)
        self._answer: Tensor | None = None  # the teacher's mean output in this step so far, where it is read
        self._collapsed_since: int | None = None  # step
        self._warned = False

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]
        return self.student.backbone

    def views(self, batch: Batch) -> tuple[Float[Tensor, "2 b 3 s s"], Float[Tensor, "v b 3 m m"]]:
        """Two global and v local views of each image (section 3.1, "multi-crop"), normalised."""
        mean, std = self.backbone.mean, self.backbone.std
        with fusing(self.compiled):
            views = multi_crop(batch, self.seed, self.crops)
            return normalise(views[0], mean, std), normalise(views[1], mean, std)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        large, small = self.views(batch)
        with torch.no_grad():
            teacher = at_least_float32(self.teacher(large))
        student = self.student(large, self.drop_path_draws(batch.positions, range(2)))
        if len(small):
            draws = self.drop_path_draws(batch.positions, range(2, 2 + len(small)))
            student = torch.cat([student, self.student(small, draws)])
        targets = teacher_targets(teacher, self.center, self.scheduled["teacher_temperature"])
        with fusing(self.compiled):
            loss = dino_loss(targets, student, self.student_temperature)
        self.update_center(teacher)
        if self.is_read:
            part = mean_over_ranks(targets.mean(dim=(0, 1))) / self.accumulate
            self._answer = part if self._answer is None else self._answer + part
        read = self.report(loss, **({"teacher_entropy": entropy(targets).mean()} if self.is_read else {}))
        if read and self._answer is not None:
            read["teacher_information"] = information(self._answer, read["teacher_entropy"])
            self.log_dict({"teacher_information": read["teacher_information"]})
            self._answer = None
        self.warn_of_collapse(read)
        return loss

    @torch.no_grad()
    def update_center(self, teacher: Float[Tensor, "2 b k"]) -> None:
        """Equation 4: a moving average of the teacher's output over the global batch, once its last loss has used the old one.
        `optimizer_step` takes it back if the step is not taken."""
        mean = mean_over_ranks(teacher.mean(dim=(0, 1)))
        self.batch_center.add_(mean.to(self.center.dtype) / self.accumulate)
        if self.completes_step:
            self.old_center.copy_(self.center)
            self.center.lerp_(self.batch_center, 1 - self.teacher_config.center_momentum)
            self.batch_center.zero_()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The teacher's moving average, after the step. Not in a callback: checkpoints are written before callbacks run."""
        super().optimizer_step(*args, **kwargs)
        assert self.skip is not None
        with torch.no_grad():
            teacher: list[Tensor] = [*self.teacher.parameters()]
            student: list[Tensor] = [*self.student.parameters()]
            share = (1 - self.scheduled["teacher_momentum"]) * (1 - self.skip.to(teacher[0].dtype))  # 0 for a step that is not taken
            if share.is_cuda:  # where a lerp by a weight on the device would be a kernel for each tensor
                way = torch._foreach_sub(student, teacher)
                torch._foreach_mul_(way, share)
                torch._foreach_add_(teacher, way)
            else:
                torch._foreach_lerp_(teacher, student, [share] * len(teacher))
            self.center.copy_(torch.where(self.skip > 0, self.old_center, self.center))

    def schedule(self, step: int) -> dict[str, float]:
        """Beside the shared values the teacher's. Its temperature is constant within an epoch, as in the authors' code, whose
        `teacher_temp_schedule` is a table by epoch; a warm-up of a fraction of an epoch has no such table and goes step by step."""
        teacher = self.teacher_config
        whole = float(teacher.warmup_epochs).is_integer()
        at, warmup = (step // self.steps_of(1.0), int(teacher.warmup_epochs)) if whole else (step, self.steps_of(teacher.warmup_epochs))
        return {
            **super().schedule(step),
            "teacher_momentum": cosine(step, self.total_steps, teacher.momentum, 1.0),
            "teacher_temperature": linear(at, warmup, teacher.warmup_temperature, teacher.temperature),
        }

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        """Each parameter's own norm is bounded, and the last layer stands still at first (`freeze_last_layer`)."""
        if self.clip_grad:
            clip_each(self.student.parameters(), self.clip_grad)
        if self.trainer.global_step < self.steps_of(self.head_config.freeze_epochs):
            for parameter in self.student.head.last.parameters():
                parameter.grad = None
        if gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def warn_of_collapse(self, read: dict[str, float]) -> None:
        """Warn once when the teacher's information, each time that it is read, has been near 0 for a while. Needs no labels, and tells
        what the loss cannot."""
        if not read.get("teacher_information", 1.0) < COLLAPSED:  # also where it is not finite
            self._collapsed_since = None if read else self._collapsed_since
            return
        if self._collapsed_since is None:
            self._collapsed_since = self.global_step
        steps = self.global_step - self._collapsed_since
        if steps >= COLLAPSED_STEPS and not self._warned:
            self._warned = True
            log.warning(
                "the teacher gives all images the same answer (%.4f of ln k between images for %d steps, entropy %.2f of ln k): collapsed; "
                "change teacher.temperature, teacher.center_momentum or optim.lr",
                read["teacher_information"],
                steps,
                read["teacher_entropy"] / math.log(self.head_config.prototypes),
            )


def mean_over_ranks(own: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """In place, where there are several."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(own)
        own /= torch.distributed.get_world_size()
    return own


def information(answer: Float[Tensor, " k"], mean_entropy: float) -> float:
    """H(mean) - mean H of the teacher's outputs for a global batch, in units of ln k, from their mean and their mean entropy: near 0 when
    all images get the same answer, be it uniform or one prototype."""
    return (float(entropy(answer)) - mean_entropy) / math.log(len(answer))


def entropy(probabilities: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    total: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return total
