"""CUDA syntax to C++, on text alone."""

import pytest

from .rewriter import RewriteError, rewrite


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_launch() -> None:
    assert squeezed(rewrite("fill<<<grid, 128, 0, stream>>>(x, f(a, b));")) == (
        '::cuda_on_cpu::launch("fill", ::cuda_on_cpu::Configuration{grid, 128, 0, stream}, fill, x, f(a, b));'
    )


def test_launch_without_arguments() -> None:
    assert rewrite("go<<<1, 32>>>();") == '::cuda_on_cpu::launch("go", ::cuda_on_cpu::Configuration{1, 32}, go);'


def test_launch_of_a_template_over_several_lines() -> None:
    rewritten = rewrite("if (x) {\n  ns::sum<float, 3><<<dim3(1, 2),\n      64>>>(\n      a);\n}\n")
    assert 'launch("ns::sum<float, 3>", ::cuda_on_cpu::Configuration{dim3(1, 2),\n      64}' in rewritten
    assert rewritten.count("\n") == 5


def test_two_launches_and_a_shift() -> None:
    rewritten = rewrite("a<<<1, 1>>>(1 << 3); b<<<2, 2>>>(x);")
    assert rewritten.count("::cuda_on_cpu::launch(") == 2
    assert "a, 1 << 3)" in rewritten


def test_shared_array() -> None:
    assert squeezed(rewrite("__shared__ float part[4][N + 1];")) == (
        "struct part_tag; using part_type = float[4][N+1]; "
        "part_type& part = ::cuda_on_cpu::shared<part_type, part_tag>();"
    )


def test_shared_with_alignment_and_several_names() -> None:
    for alignment in ("alignas(16) ", "__align__(16) "):
        rewritten = rewrite(f"__shared__ {alignment}std::pair<int, int> a[2], b;")
        assert "using a_type = std::pair<int, int>[2];" in rewritten
        assert "using b_type = std::pair<int, int>;" in rewritten


def test_dynamic_shared() -> None:
    assert rewrite("extern __shared__ __align__(16) unsigned char bytes[];") == (
        "unsigned char* const bytes = static_cast<unsigned char*>(::cuda_on_cpu::dynamic_shared());"
    )


def test_comments_and_strings_stay() -> None:
    source = '// f<<<1, 1>>>(x)\nputs("<<<a>>> __shared__ int x;"); /* __shared__ */\n'
    assert rewrite(source) == source


def test_lines_stay() -> None:
    source = "__shared__ int a[2]\n  [3];\nf<<<1,\n 1>>>(x);\n__LINE__\n"
    assert rewrite(source).split("\n").index("__LINE__") == source.split("\n").index("__LINE__")


@pytest.mark.parametrize("source", ["__shared__ int x = 3;", "f<<<1, 2>>>;", "f<<<1, 2(x);", "f<<<1, 2>>>(x;"])
def test_what_is_not_understood_is_an_error(source: str) -> None:
    with pytest.raises(RewriteError):
        rewrite(source)
