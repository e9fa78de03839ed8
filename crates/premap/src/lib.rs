//! Maps a virtual machine's memory before the guest touches it.
