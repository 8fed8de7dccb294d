from dataclasses import dataclass, field

from fedpeft.tree import Tree


@dataclass
class Memory:
    """What the clients of a test keep, one cohort for all."""

    round: int = 1
    trees: dict[str, Tree] = field(default_factory=dict)

    def recall(self, name: str, default: Tree) -> Tree:
        return {key: value.clone() for key, value in self.trees.get(name, default).items()}

    def remember(self, name: str, value: Tree) -> None:
        self.trees[name] = {key: tensor.clone() for key, tensor in value.items()}
