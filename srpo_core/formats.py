"""The published formats of the field: how each marks what the model sees, concludes and answers."""

from difflib import get_close_matches
from typing import NamedTuple

from srpo_core.tags import DEFAULT_TAGS, RoleTags

__all__ = ["FORMATS", "PUBLISHED", "PublishedFormat", "read_format"]


class PublishedFormat(NamedTuple):
    """The response format of a known model or training recipe.

    Attributes:
        tags: Its tags.
        source: Who uses it, with the number of the paper if there is one.
        example: A whole response in this format.
    """

    tags: RoleTags
    source: str
    example: str


def _format(source: str, grammar: str, example: str) -> PublishedFormat:
    return PublishedFormat(RoleTags.of_grammar(grammar), source, example)


#: By name. Formats without a block for perception are not among them: nothing in them says which tokens depend on the
#: image, so that there is nothing to weight.
PUBLISHED: dict[str, PublishedFormat] = {
    "default": PublishedFormat(
        DEFAULT_TAGS,
        "this project",
        "<perception>Three red cubes and a blue ball.</perception>\n"
        "<think>Of the four objects three are red.</think>\n<answer>3</answer>",
    ),
    "vision-sr1": _format(
        "Vision-SR1, arXiv:2508.19652",
        r"perception = <description> ... </description>; reasoning = <think> ... </think>; answer = \boxed{ ... }",
        "<description>Three red cubes and a blue ball.</description>\n"
        "<think>Not \\boxed{4}: of the four objects three are red.</think>\n\\boxed{3}",
    ),
    "visionary-r1": _format(
        "Visionary-R1, arXiv:2505.14677",
        "perception = <info> ... </info>; reasoning = <think> ... </think>; answer = <answer> ... </answer>",
        "<info>Three red cubes and a blue ball.</info>\n"
        "<think>Of the four objects three are red.</think>\n<answer>3</answer>",
    ),
    "observe-r1": _format(
        "Observe-R1, arXiv:2505.12432",
        "perception = <observe> ... </observe>; reasoning = <think> ... </think>; answer = <answer> ... </answer>",
        "<observe>Three red cubes and a blue ball.</observe>\n"
        "<think>Of the four objects three are red.</think>\n<answer>3</answer>",
    ),
    "spatial-thinker": _format(
        "SpatialThinker, arXiv:2511.07403; its scene graph is the perception, its <observe> counts as neither",
        "perception = <scene> ... </scene>; reasoning = <think> ... </think>; answer = <answer> ... </answer>",
        "<observe>A table from above.</observe>\n"
        '<scene>{"objects": [{"id": "cube.1", "bbox": [4, 8, 20, 24]}]}</scene>\n'
        "<think>There is one cube.</think>\n<answer>1</answer>",
    ),
    "satori-r1": _format(
        "SATORI-R1, arXiv:2505.19094; its boxes count as reasoning",
        "perception = <caption> ... </caption>; reasoning = <bbox> ... </bbox>; answer = <answer> ... </answer>",
        "<caption>Three red cubes and a blue ball.</caption>\n<bbox>[[4, 8, 20, 24]]</bbox>\n<answer>3</answer>",
    ),
    "llava-cot": _format(
        "LLaVA-CoT, arXiv:2411.10440; its <SUMMARY> counts as neither",
        "perception = <CAPTION> ... </CAPTION>; reasoning = <REASONING> ... </REASONING>; "
        "answer = <CONCLUSION> ... </CONCLUSION>",
        "<SUMMARY>I will count the red objects.</SUMMARY>\n\n<CAPTION>Three red cubes and a blue ball.</CAPTION>\n\n"
        "<REASONING>Of the four objects three are red.</REASONING>\n\n<CONCLUSION>3</CONCLUSION>",
    ),
    "nested": _format(
        "this project, for models that look while they think",
        "perception in reasoning = <perception> ... </perception>; reasoning = <think> ... </think>; "
        "answer = <answer> ... </answer>",
        "<think>I look first. <perception>Three red cubes and a blue ball.</perception> Of the four three are red. "
        "<perception>The ball is blue.</perception> So it does not count.</think>\n<answer>3</answer>",
    ),
    "headings": _format(
        "this project, for models that write Markdown",
        "perception = ### Perception; reasoning = ### Reasoning; answer = ### Answer",
        "### Perception\nThree red cubes and a blue ball.\n\n### Reasoning\nOf the four objects three are red.\n\n"
        "### Answer\n3",
    ),
    "json-boxes": _format(
        "this project, with the fenced lists of boxes of Qwen2.5-VL, arXiv:2502.13923",
        "perception = ```json ... ```; reasoning = <think> ... </think>; answer = <answer> ... </answer>",
        '```json\n[\n\t{"bbox_2d": [4, 8, 20, 24], "label": "red cube"}\n]\n```\n'
        "<think>There is one box, so there is one cube.</think>\n<answer>1</answer>",
    ),
}

#: The tags of each of them.
FORMATS: dict[str, RoleTags] = {name: published.tags for name, published in PUBLISHED.items()}


def read_format(value: str) -> RoleTags:
    """The format with a name of :data:`FORMATS`, or the one that lines for :meth:`RoleTags.of_grammar` describe.

    Args:
        value: A name, or lines with one ``=`` each.

    Raises:
        ValueError: If it is neither. The message is a sentence without its subject, so that the caller can begin it
            with the name of the argument.

    Example:
        >>> read_format("visionary-r1").perception, read_format("perception = See:; reasoning = Think:").reasoning
        (('<info>', '</info>'), ('Think:', ''))
    """
    if "=" not in value:
        name = value.strip().lower()
        if name in FORMATS:
            return FORMATS[name]
        close = get_close_matches(name, FORMATS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"must be one of {', '.join(map(repr, FORMATS))}, or lines such as 'perception = <see> ... </see>', "
            f"got {value!r}{hint}"
        )
    try:
        return RoleTags.of_grammar(value)
    except ValueError as error:
        raise ValueError(f"is not a format: {error}") from None
