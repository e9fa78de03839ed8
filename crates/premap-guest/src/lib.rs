//! Small machines with a guest that touches memory on request, on /dev/kvm and on the software KVM.
