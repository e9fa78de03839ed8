//! Guest-physical, host-virtual and host-physical addresses, frames, ranges and page sizes.
