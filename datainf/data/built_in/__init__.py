"""The data that is generated here: classification tasks with GLUE's columns, texts, and pictures.

`tasks` draws `reviews` and `paraphrases` from their grammars (`words`); `transformations` and `math_problems` are the
text tasks; `scenes` and `things` are the pictures.
"""

from datainf.data.built_in.tasks import TASKS, generate

__all__ = ["TASKS", "generate"]
