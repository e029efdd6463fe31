"""Operations and traffic, counted by hand for programs small enough."""

import jax
import jax.numpy as jnp
import pytest

from avg_llava_jax import parameters
from avg_llava_jax.commands.planning import largest_shape
from avg_llava_jax.config import LanguageConfig, from_dict
from avg_llava_jax.configs import jersey
from avg_llava_jax.models import attention, language
from avg_llava_jax.parallel.costs import Access, Traffic, accesses, collectives, flops, language_flops, step_flops
from avg_llava_jax.training import phases
from avg_llava_jax.training.config import OptimizerConfig, RglfConfig
from avg_llava_jax.training.optimizer import trainable
from launch.bench.parts import random_batch


def test_flops_of_loops_branches_and_gradients():
    a, b = jnp.zeros((4, 5)), jnp.zeros((5, 5))
    product = 2 * 4 * 5 * 5

    def count(function, *arguments):
        return flops(jax.make_jaxpr(function)(*arguments).jaxpr)

    def loop(a, b):
        return jax.lax.scan(lambda x, _: (jax.jit(jnp.dot)(x, b), None), a, None, length=3)[0]

    assert count(loop, a, b) == 3 * product
    assert count(jax.vmap(loop, (0, None)), jnp.zeros((2, 4, 5)), b) == 6 * product
    assert count(lambda a, b: jax.lax.cond(a[0, 0] > 0, loop, jnp.dot, a, b), a, b) == 3 * product
    assert count(jax.grad(lambda b, a: jnp.sum(jnp.sin(a @ b))), b, a) == 2 * product
    again = jax.checkpoint(lambda b, a: jnp.sum(jnp.sin(jnp.sin(a @ b) @ b)))
    assert count(jax.grad(again), b, a) > count(jax.grad(lambda b, a: jnp.sum(jnp.sin(jnp.sin(a @ b) @ b))), b, a)


def test_flops_of_a_sequence_by_hand():
    one = LanguageConfig(vocab_size=3, width=1, layers=1, heads=1, kv_heads=1, head_dim=1, mlp_width=1)
    assert language_flops(one, rows=1, length=2, answer=1) == 50


def test_flops_of_a_decoder_with_its_own_head_dim(monkeypatch):
    """Against the trace: what biases and norms of q and k cost is no product."""
    monkeypatch.setattr(attention, "kernel_for", lambda *_: "dense")
    sizes = {"vocab_size": 7, "width": 12, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 20}
    own = LanguageConfig(**sizes, qkv_bias=True, qk_norm=True)

    def answer(params, ids):
        hidden, _ = language.decoder(own, params, language.embed(params, ids))
        return language.unembed(own, params, hidden[:, :2])

    shapes = jax.eval_shape(lambda: language.init(own, jax.random.key(0)))
    trace = jax.make_jaxpr(answer)(shapes, jax.ShapeDtypeStruct((2, 5), jnp.int32))
    assert language_flops(own, rows=2, length=5, answer=2) == flops(trace.jaxpr)


@pytest.mark.parametrize("phase", ["multi_granularity", "rglf"])
def test_the_formula_counts_what_the_step_computes(phase, monkeypatch):
    """Against the trace to 0.01 %; against XLA, which counts additions, softmax and the like as well, to 5 %."""
    # Plain attention: the others form their scores twice.
    monkeypatch.setattr(attention, "kernel_for", lambda *_: "dense")
    model = from_dict(jersey.model().to_dict())
    shape = largest_shape(model, text=64, answer=16)
    loss = phases.make_loss(phase, model, model.granularities, RglfConfig(), "none")
    whole = parameters.abstract(model)
    ours, frozen = parameters.split(whole, trainable(phase, OptimizerConfig(1e-3, 1e-3)))

    @jax.jit
    def grad(ours, frozen, batch, keys):
        return jax.grad(lambda ours: loss(parameters.merge(ours, frozen), batch, keys)[0])(ours)

    traced = grad.trace(ours, frozen, random_batch(model, 2, shape), jax.random.split(jax.random.key(0), 2))
    formula = sum(step_flops(model, phase, model.granularities, 2, shape).values())
    assert formula == pytest.approx(flops(traced.jaxpr.jaxpr), rel=1e-4)
    assert formula == pytest.approx(traced.lower().cost_analysis()["flops"], rel=0.05)


HLO = """HloModule jit_step, num_partitions=8

%sum (x: f32[], y: f32[]) -> f32[] {
  ROOT %add = f32[] add(%x, %y)
}

%body (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %gathered = f32[64,16]{1,0:T(8,128)} all-gather(%part), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %summed = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
  ROOT %next = (s32[], f32[8,16]{1,0}) tuple(%i, %x)
}

%more (state: (s32[], f32[8,16])) -> pred[] {
  %limit.3.clone.1 = s32[]{:T(128)} constant(3)
  %count = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %below = pred[]{:T(512)} compare(%count, %limit.3.clone.1), direction=LT, metadata={op_name="jit(f)/lt"}
}

%inside (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %kept = f32[2,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}

%all-reduce-scatter.1 (x: f32[8,16]) -> f32[2,16] {
  %all = f32[8,16]{1,0} all-reduce(%x), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%sum
  ROOT %slice = f32[2,16]{1,0} dynamic-slice(%all, %i, %zero), dynamic_slice_sizes={2,16}
}

%windowed_cond (state: (f32[2,16], u32[])) -> pred[] {
  %ends = u32[]{:T(128)} constant(8), metadata={op_name="jit(f)/dot_general"}
  %at.1 = u32[]{:T(128)} get-tuple-element(%state), index=1
  ROOT %on = pred[]{:T(512)} compare(%at.1, %ends), direction=LT
}

%windowed (state: (f32[2,16], u32[])) -> (f32[2,16], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %one = u32[]{:T(128)} constant(1)
  %between = u32[]{:T(128)S(6)} add(%at.2, %one), metadata={op_name="jit(f)/dot_general"}
  %after = u32[]{:T(128)} add(%two, %at.2), metadata={op_name="jit(f)/dot_general"}
  %sent = (f32[2,16]{1,0}, f32[2,16]{1,0}, u32[], u32[]) collective-permute-start(%part), source_target_pairs={{0,1}}
  %arrived = f32[2,16]{1,0} collective-permute-done(%sent)
  ROOT %state.2 = (f32[2,16]{1,0}, /*index=1*/u32[]{:T(128)}) tuple(%arrived, /*index=1*/%after), metadata={}
}

%starts (x: f32[8,16]) -> (f32[8,16], f32[64,16]) {
  %all.1 = f32[64,16]{1,0} all-gather(%x), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%async_collective_fusion.3 (x: (f32[8,16], f32[64,16])) -> (f32[4,4], f32[8,16], f32[64,16]) {
  %all.3 = f32[64,16]{1,0} all-gather(%x), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%ends (x: (f32[8,16], f32[64,16])) -> f32[64,16] {
  ROOT %all.2 = f32[64,16]{1,0} all-gather(%x), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (p: f32[8,16]) -> f32[8,16] {
  %loop = (s32[], f32[8,16]) while(%init), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %other = (s32[], f32[8,16]{1,0}) while(%init), condition=%more, body=%inside, metadata={op_name="scan"}
  %product = (f32[2,16]{1,0}, u32[]) while(%begin), condition=%windowed_cond, body=%windowed, metadata={op_name="dot"}
  %async-collective-start = (f32[8,16]{1,0}, f32[64,16]{1,0}) fusion(%p), kind=kCustom, calls=%starts
  %fusion = (f32[4,4]{1,0}, f32[8,16]{1,0}, f32[64,16]{1,0}) fusion(%p), kind=kOutput, calls=%async_collective_fusion.3
  %async-collective-done = f32[64,16]{1,0} fusion(%async-collective-start), kind=kCustom, calls=%ends
  %start = (f32[8,16]{1,0}, f32[32,16]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %done = f32[32,16]{1,0} all-gather-done(%start)
  %own = f32[2,16]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%sum
  ROOT %moved = f32[8,16]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
"""


def test_traffic_over_a_ring_counts_loops():
    found = collectives(HLO)
    assert found == {
        "all-gather": Traffic(7, 5 * 64 * 16 * 4 * 3 / 4 + 32 * 16 * 4 * 3 / 4 + 64 * 16 * 4 * 7 / 8),
        "all-reduce": Traffic(5, 5 * (16 + 12) * 2 / 2),
        "reduce-scatter": Traffic(1 + 3, 2 * 16 * 4 * 3 + 3 * 8 * 16 * 4 * 3 / 4),
        "collective-permute": Traffic(1 + 8 / 2, 8 * 16 * 4 + 8 / 2 * 2 * 16 * 4),
    }


GPU = """HloModule jit_step, num_partitions=8

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %collective-permute-start = (f32[8,16]{1,0}, f32[8,16]{1,0}) collective-permute-start(%copy.11), channel_id=1, source_target_pairs={{0,4},{4,0}}, metadata={op_name="jit(f)/shard_map/ppermute"}
  %collective-permute-done = f32[8,16]{1,0} collective-permute-done(%collective-permute-start)
  %reduce-scatter-start = ((f32[8,16]{0,1}), f32[8,4]{0,1}) reduce-scatter-start(%bitcast.33.0), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, dimensions={1}, to_apply=%region_0.0
  %reduce-scatter-done = f32[8,4]{0,1} reduce-scatter-done(%reduce-scatter-start)
  %reduce-scatter-start.1 = ((f32[32,300]{1,0}, f32[32,16]{1,0}), (f32[4,300]{1,0}, /*index=1*/f32[4,16]{1,0})) reduce-scatter-start(%slice, %slice.1), channel_id=2, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, to_apply=%add.53.clone
  %all-gather-start = (f32[8,16]{1,0}, f32[32,16]{1,0}) all-gather-start(%copy.11), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, use_global_device_ids=true
  %all-gather-start.1 = ((f32[16,300]{1,0}, f32[16,16]{1,0}), (f32[32,300]{1,0}, f32[32,16]{1,0})) all-gather-start(%a, %b), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  %all-to-all-start = ((f32[8,16]{0,1}), f32[8,16]{0,1}) all-to-all-start(%bitcast.33.0), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}
  %all-reduce-start.19 = f32[7488]{0} all-reduce-start(%wrapped), channel_id=5, replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}, use_global_device_ids=true, to_apply=%add.1.clone
}
"""  # noqa: E501 - as XLA for GPUs writes it


def test_traffic_of_a_gpu_counts_what_comes_out_alone():
    """The type of a -start names the operands too, in one of three ways, and a group may be named by a mesh."""
    assert collectives(GPU) == {
        "collective-permute": Traffic(1, 8 * 16 * 4),
        "reduce-scatter": Traffic(2, 8 * 4 * 4 * 3 + (4 * 300 + 4 * 16) * 4 * 7),
        "all-gather": Traffic(2, 32 * 16 * 4 * 3 / 4 + (32 * 300 + 32 * 16) * 4 / 2),
        "all-to-all": Traffic(1, 8 * 16 * 4 * 3 / 4),
        "all-reduce": Traffic(1, 7488 * 4 * 2 / 2),
    }


MOVES = """HloModule jit_f

%slices (param_0: f32[3,8,4], param_1: s32[]) -> f32[8,4] {
  %param_0 = f32[3,8,4]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %layer = f32[1,8,4]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %weight = f32[8,4]{1,0} bitcast(%layer)
}

%keeps (param_0.1: bf16[2,100], param_1.1: bf16[2,1], param_2: s32[]) -> bf16[2,100] {
  %param_0.1 = bf16[2,100]{1,0} parameter(0)
  %param_1.1 = bf16[2,1]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  ROOT %kept = bf16[2,100]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %zero, %param_2)
}

%more (state: (s32[], f32[3,8,4], bf16[2,100])) -> pred[] {
  %limit = s32[] constant(3)
  %count = s32[] get-tuple-element(%state), index=0
  ROOT %below = pred[] compare(%count, %limit), direction=LT
}

%body (state: (s32[], f32[3,8,4], bf16[2,100])) -> (s32[], f32[3,8,4], bf16[2,100]) {
  %at = s32[] get-tuple-element(%state), index=0
  %weights = f32[3,8,4]{2,1,0} get-tuple-element(%state), index=1
  %cache = bf16[2,100]{1,0} get-tuple-element(%state), index=2
  %slice_fusion = f32[8,4]{1,0} fusion(%weights, %at), kind=kLoop, calls=%slices, metadata={op_name="layers/slice"}
  %product = (bf16[2,1]{1,0}, s8[4194304]{0}) custom-call(%slice_fusion), custom_call_target="__cublas$gemm"
  %new = bf16[2,1]{1,0} get-tuple-element(%product), index=0
  %update_fusion = bf16[2,100]{1,0} fusion(%cache, %new, %at), kind=kLoop, calls=%keeps
  ROOT %next = (s32[], f32[3,8,4]{2,1,0}, bf16[2,100]{1,0}) tuple(%at.1, %weights, %update_fusion)
}

ENTRY %main (p: f32[3,8,4], c: bf16[2,100]) -> bf16[2,100] {
  %p = f32[3,8,4]{2,1,0} parameter(0)
  %c = bf16[2,100]{1,0:T(8,128)S(1)} parameter(1)
  %copied = bf16[2,100]{1,0} copy(%c)
  %loop = (s32[], f32[3,8,4], bf16[2,100]) while(%init), condition=%more, body=%body
  %fetched = (f32[3,8,4]{2,1,0:S(1)}, f32[3,8,4]{2,1,0}, u32[]{:S(2)}) copy-start(%p)
  ROOT %out = bf16[2,100]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_what_a_program_moves():
    """Of a stack of weights one layer a turn, of a cache what is new; workspaces and a core's own memory are free."""
    found = {each.source: each for each in accesses(MOVES)}
    assert found == {
        "copied": Access("copy", "copied", 1, 0.0, 400.0),
        "layers/slice": Access("fusion", "layers/slice", 3, 128.0 + 4, 128.0),
        "product": Access("custom-call", "product", 3, 128.0, 4.0),
        "update_fusion": Access("fusion", "update_fusion", 3, 4.0 + 4, 4.0),
        "fetched": Access("copy-start", "fetched", 1, 384.0, 0.0),
    }
    assert found["product"].bytes == 3 * 132
