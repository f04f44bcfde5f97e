(__global float* restrict a0, __global const float* restrict a1) {
  for (int i0 = (int)get_group_id(0) * 30 / 4; i0 < ((int)get_group_id(0) + 1) * 30 / 4; ++i0) {
    const int i1 = i0 / 5 % 6 + 0;
    const int i2 = i0 % 5 + 0;
    *((a0 + ((i1 * 5)+i2))) = ((i1 < 3) ? (*((a1 + ((i1 * 5)+i2)))) : 0x0.0p+0f);
  }
}
