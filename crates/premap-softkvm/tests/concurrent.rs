//! Many vCPUs at once: pre-faulting, touching, and host memory that goes away, each on a thread of its own.

mod guest;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use guest::*;
use premap_address::{Gpa, PAGE_SIZE};
use premap_softkvm::Profile;
use rustix::mm::Advice;

const GPA: u64 = 1 << 32;

#[test]
fn two_vcpus_pre_fault_the_same_memory_and_map_each_page_once() {
    const PAGES: u64 = 2048;
    for profile in [Profile::V6_12, Profile::V7_2] {
        let memory = Memory::anonymous(PAGES);
        memory.populate_write(0..PAGES);
        let vm = vm(profile);
        attach(&vm, 0, 0, GPA, &memory);
        thread::scope(|scope| {
            for id in 0..2 {
                let vm = &vm;
                scope.spawn(move || {
                    let mut vcpu = vm.create_vcpu(id).unwrap();
                    pre_fault_all(&mut vcpu, GPA, PAGES);
                    write_each(&mut vcpu, GPA, PAGES);
                    assert_eq!(stat(&vcpu, "pf_taken"), 0);
                });
            }
        });
        assert_eq!(mapped(&vm), [PAGES, 0, 0]);
    }
}

#[test]
fn a_spare_vcpu_pre_faults_while_the_guest_writes() {
    const PAGES: u64 = 4096;
    let memory = Memory::anonymous(PAGES);
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut vcpu = vm.create_vcpu(0).unwrap();
            write_each(&mut vcpu, GPA, PAGES);
            (0..PAGES).all(|page| vcpu.read(Gpa::new(GPA + page * PAGE_SIZE)) == Ok(page))
        });
        let mut spare = vm.create_vcpu(1).unwrap();
        for chunk in 0..PAGES / 512 {
            memory.populate_write(chunk * 512..(chunk + 1) * 512);
            pre_fault_all(&mut spare, GPA + chunk * HUGE, 512);
        }
        assert!(guest.join().unwrap(), "what was written is what is read");
    });
    assert_eq!(mapped(&vm), [PAGES, 0, 0]);
    assert!((0..PAGES).all(|page| memory.word(page, 0) == page));
}

/// Each page has an owner that increments a word in it; every other word of the page stays zero unless another is at work
/// there. Meanwhile memory is discarded, and slots come and go elsewhere, which drops every root.
#[test]
fn content_is_right_whatever_is_unmapped_meanwhile() {
    const PAGES: u64 = 256;
    let (memory, elsewhere) = (Memory::memfd(PAGES), Memory::memfd(8));
    let vm = vm(Profile::V7_2);
    attach(&vm, 0, 0, GPA, &memory);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..2_u32)
            .map(|id| {
                let (vm, stop) = (&vm, &stop);
                scope.spawn(move || {
                    let mut vcpu = vm.create_vcpu(id).unwrap();
                    let mut rounds = 0_u64;
                    while !stop.load(Ordering::SeqCst) || rounds < 3 {
                        for page in 0..PAGES {
                            let word = Gpa::new(GPA + page * PAGE_SIZE + 8 * u64::from(id));
                            assert_eq!(vcpu.read(word), Ok(rounds), "page {page} of vCPU {id}");
                            vcpu.write(word, rounds + 1).unwrap();
                        }
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        let mut spare = vm.create_vcpu(9).unwrap();
        for round in 0..100_u64 {
            let part = (round * 31) % PAGES..((round * 31) % PAGES + 16).min(PAGES);
            // Of a shared mapping this drops the mapping of the pages, never their content.
            vm.notifier().invalidate(&memory.range(part.clone()), || {
                memory.advise(part.clone(), Advice::LinuxDontNeed);
            });
            pre_fault_all(&mut spare, GPA + part.start * PAGE_SIZE, part.end - part.start);
            if round % 10 == 0 {
                attach(&vm, 1, 0, 2 * GPA, &elsewhere);
                detach(&vm, 1);
            }
        }
        stop.store(true, Ordering::SeqCst);
        for (id, worker) in (0_u64..).zip(workers) {
            let rounds = worker.join().unwrap();
            assert!((0..PAGES).all(|page| memory.word(page, id) == rounds));
        }
    });
}

#[test]
fn vcpu_numbers_are_unique_and_free_again() {
    let vm = vm(Profile::V6_12);
    let first = vm.create_vcpu(3).unwrap();
    assert_eq!(vm.create_vcpu(3).unwrap_err(), premap_kvm::Errno::EXIST);
    assert_eq!(vm.create_vcpu(1 << 20).unwrap_err(), premap_kvm::Errno::INVAL);
    drop(first);
    assert_eq!(vm.create_vcpu(3).unwrap().id(), 3);
}
