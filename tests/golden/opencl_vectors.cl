(__global float* restrict a0, __global const float* restrict a1) {
  #pragma unroll
  for (int i0 = 0; i0 < 4; i0 += 1) {
    ((__global unaligned_float8*)((a0 + ((i0 * 8)))))->v = (larger_float8(((__global const unaligned_float8*)((a1 + ((i0 * 8)))))->v, (float8)(0x0.0p+0f)) * (float8)(0x1.0000000000000p-1f));
  }
}
