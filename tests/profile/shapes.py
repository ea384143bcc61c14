"""Models and work of any size, for properties that hold for all of them."""

from __future__ import annotations

from hypothesis import strategies as st

from vllm_flow.profile.dimensions import ModelShape, TowerShape, Workload

small = st.integers(1, 12)


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    kv_heads, per_kv, head_dim = draw(small), draw(st.integers(1, 4)), draw(st.integers(1, 16))
    heads = kv_heads * per_kv
    tower = TowerShape(draw(small), draw(small), draw(small), draw(small), draw(small))
    return ModelShape(
        layers=draw(st.integers(1, 40)),
        hidden=heads * head_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=draw(small),
        vocab=draw(small),
        tower=draw(st.sampled_from((None, tower))),
        value_bytes=draw(st.sampled_from((2, 4))),
    )


@st.composite
def works(draw: st.DrawFn) -> Workload:
    return Workload(
        draw(st.integers(1, 50)), draw(st.integers(0, 300)), draw(st.integers(1, 30)),
        draw(st.integers(0, 3)),
    )  # fmt: skip


def cliffs(shape: ModelShape) -> st.SearchStrategy[int]:
    return st.integers(0, shape.layers)
