"""Kernels by their names, and how long a GPU is idle. The names are from profiles of Hopper and Ampere cards."""

from typing import Any

import pytest

from benchmarks.kernel_times import kind_of, shares, union

NAMES = {
    "matrix products": (
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT",
        "nvjet_qqtst_128x192_128x5_1x2_h_bz_coopA_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>(Params)",
        "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal<"
        "cutlass::gemm::GroupProblemShape<cute::tuple<int, int, int> >",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, false>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>",
        "triton_tem_fused_mm_3",
    ),
    "attention": (
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_128x64x128_1x1x1_cga1x1x1_kernel0_0",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, "
        "cutlass::bfloat16_t>, false, true, false, false>",
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2> > >",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel::Params)",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128, 128, 1>",
        "void cudnn::fusion::convert_dq_to_16bits<true, __nv_bfloat16, __nv_bfloat16, 128, 128, 4>",
        "void scaled_upper_triang_masked_softmax_warp_forward<__nv_bfloat16, __nv_bfloat16, float, 12>",
    ),
    "copies": (
        "Memcpy HtoD (Pinned -> Device)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::"
        "{lambda()#3}::operator()() const::{lambda()#12}>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<OpaqueType<2u>, unsigned, 3>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul> >",
    ),
    "other": (
        "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16> >",
        "triton_poi_fused_mul_silu_0",
        "void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<Kernel_traits<__nv_bfloat16> >",
        "void transformer_engine::cast_transpose_fused_kernel_notaligned<false, false, __nv_bfloat16, __nv_fp8_e4m3>",
        "void multi_tensor_apply_kernel<TensorListMetadata<4, false>, AdamFunctorMaster<__nv_bfloat16, float> >",
        "_permute_kernel",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    ),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_kinds(kind: str, name: str) -> None:
    assert kind_of(name) == kind


def test_overlapping_streams_count_once() -> None:
    assert union([]) == 0
    assert union([(5, 6), (0, 2)]) == 3
    assert union([(0, 10), (2, 3), (9, 12), (12, 13), (20, 21)]) == 14


def event(name: str, start: float, duration: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration}


def test_shares_of_a_step() -> None:
    trace = [
        event("nvjet_tst_128x256", 0, 500_000),
        event("cudnn_sdpa_flash", 500_000, 200_000),
        event("_permute_kernel", 600_000, 200_000),  # on another stream, half of it beside attention
        event("Memcpy HtoD", 900_000, 100_000, "gpu_memcpy"),
        event("cudaLaunchKernel", 0, 900_000, "cuda_runtime"),
        event("step", 0, 1_000_000, "gpu_user_annotation"),
        {"ph": "M", "name": "process_name"},
    ]
    found = shares(trace, profiled=1.2, steady=1.0, longest=1)
    assert found["share_of_gpu_time"] == {"matrix products": 0.5, "attention": 0.2, "copies": 0.1, "other": 0.2}
    assert found["idle"] == pytest.approx(0.1)
    assert found["idle_profiled"] == pytest.approx(0.25)
    assert found["kernels"] == 4
    assert found["longest"] == {"nvjet_tst_128x256": 0.5}


def test_a_trace_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="no kernels"):
        shares([event("aten::mm", 0, 1, "cpu_op")], profiled=1, steady=1)
