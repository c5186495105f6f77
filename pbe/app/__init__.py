"""A page on which pictures are edited by hand."""

try:
    import gradio  # noqa: F401
except ImportError as error:
    raise ImportError("the page needs the extra app: pip install -e .[app]") from error
