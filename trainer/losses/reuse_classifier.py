import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trainer.mistakes import Mistake
from trainer.networks.features import head
from trainer.tensors import full_precision


class reuse_classifier(nn.Module):
    """Reused classifier: the student learns the teacher's embedding, and at the end takes over its classifier.

    Mean squared error, over batch and width, between the student's embedding after a learned Linear layer and
    the teacher's embedding. This trains all of the student but its classifier, which `finish` sets. The
    paper's projector is three convolutions with BatchNorm and ReLU on the last feature maps, and stays in the
    student. Ours is linear on pooled embeddings: weaker, but together with the teacher's classifier it folds
    exactly into the student's own, so the exported student has no more parameters.
    Chen et al. 2022, "Knowledge Distillation with the Reused Teacher Classifier" (SimKD).
    """

    def __init__(self, student_embedding: torch.Size, teacher_embedding: torch.Size) -> None:
        super().__init__()
        self.projector = nn.Linear(student_embedding[1], teacher_embedding[1])

    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
        projected = self.projector(full_precision(student_embedding))
        return F.mse_loss(full_precision(projected), full_precision(teacher_embedding.detach()))

    @torch.no_grad()
    def finish(self, student: nn.Module, teacher_head: nn.Module) -> None:
        """Sets the student's classifier to teacher_head(projector(embedding)).

        Raises Mistake if either classifier is not a Linear layer, or the student's cannot hold the result.
        """
        if not isinstance(teacher_head, nn.Linear):
            raise Mistake(
                f"reuse_classifier: the teacher's classifier is a {type(teacher_head).__name__}; only a "
                "Linear one folds into the student's"
            )
        classifier = head(student)
        changed = parametrize.is_parametrized(classifier)
        if not isinstance(classifier, nn.Linear) or changed or classifier.bias is None:
            raise Mistake(
                f"reuse_classifier: the student's classifier is a {type(classifier).__name__}; a plain "
                "Linear layer with a bias is needed, neither pruned nor shared yet"
            )
        wanted = (teacher_head.out_features, self.projector.in_features)
        if tuple(classifier.weight.shape) != wanted:
            raise Mistake(
                f"reuse_classifier: the student's classifier has weights {tuple(classifier.weight.shape)}; "
                f"the teacher's classes and the student's embedding ask for {wanted}"
            )
        # In float64, so that the two products round once.
        weight = teacher_head.weight.double()
        bias = weight @ self.projector.bias.double()
        if teacher_head.bias is not None:
            bias = bias + teacher_head.bias.double()
        classifier.weight.copy_(weight @ self.projector.weight.double())
        classifier.bias.copy_(bias)
