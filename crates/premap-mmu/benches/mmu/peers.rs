//! The peers: single-threaded page tables that others publish. Each gets frames from the same touched memory as we do.
// UNSAFETY: the peers ask for raw memory and, in part, for unsafe calls.
#![expect(unsafe_code, reason = "the peers' interfaces are unsafe")]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicPtr, Ordering};
use std::hint::black_box;

use aarch64_paging::descriptor::{PhysicalAddress, Stage2Attributes};
use aarch64_paging::paging::{Constraints, MemoryRegion, PageTable, RootTable, Stage2, Translation};
use memory_addr::{PhysAddr, VirtAddr};
use page_table_entry::x86_64::X64PTE;
use page_table_multiarch::{MappingFlags, PageTable64, PagingHandler, PagingMetaData};
use premap_mmu::{Arena, FrameAllocator};
use x86_64::structures::paging::mapper::{Mapper, OffsetPageTable};
use x86_64::structures::paging::{
    FrameAllocator as X86Frames, Page, PageTable as X86Table, PageTableFlags, PhysFrame, Size4KiB, Translate,
};

use crate::harness::{PAGE, PAGES, Run, Sink, World, time};

const MULTIARCH: &str = "page_table_multiarch";
const X86: &str = "x86_64";
const AARCH64: &str = "aarch64-paging";

pub(crate) const RUNS: &[Run] = &[
    ("multiarch region", multiarch_region),
    ("multiarch cursor", multiarch_cursor),
    ("multiarch random", multiarch_random),
    ("x86", x86),
    ("x86 random", x86_random),
    ("aarch64", aarch64),
    ("aarch64 single", aarch64_single),
    ("aarch64 random", aarch64_random),
];

/// The arena, for a peer whose allocator has no self.
static ARENA: AtomicPtr<Arena> = AtomicPtr::new(core::ptr::null_mut());

fn frame() -> usize {
    // SAFETY: each run sets the pointer to the world's arena, which it borrows until the peer's table is gone.
    let arena = unsafe { ARENA.load(Ordering::Relaxed).as_ref() }.expect("set by the run");
    usize::try_from(arena.allocate().expect("the arena has room").address().raw()).expect("64 bits")
}

fn use_arena(world: &World) {
    ARENA.store(core::ptr::from_ref(&world.arena).cast_mut(), Ordering::Relaxed);
}

fn address(page: u64) -> usize {
    usize::try_from(page * PAGE).expect("64 bits")
}

/// x86-64's four levels, with flushes left out: the instruction is privileged.
struct Quiet;

impl PagingMetaData for Quiet {
    const LEVELS: usize = 4;
    const PA_MAX_BITS: usize = 52;
    const VA_MAX_BITS: usize = 48;

    type VirtAddr = VirtAddr;

    fn flush_tlb(_: Option<VirtAddr>) {}
}

struct Frames;

impl PagingHandler for Frames {
    fn alloc_frames(_: usize, _: usize) -> Option<PhysAddr> {
        Some(PhysAddr::from(frame()))
    }

    fn dealloc_frames(_: PhysAddr, _: usize) {}

    fn phys_to_virt(address: PhysAddr) -> VirtAddr {
        VirtAddr::from(address.as_usize())
    }
}

type Multiarch = PageTable64<Quiet, X64PTE, Frames>;

fn flags() -> MappingFlags {
    black_box(MappingFlags::READ | MappingFlags::WRITE | MappingFlags::EXECUTE)
}

fn multiarch_region(world: &mut World, sink: &mut Sink) {
    use_arena(world);
    let mut table = Multiarch::try_new().expect("a root");
    let (figure, ()) = time(|| {
        let same = |address: VirtAddr| PhysAddr::from(address.as_usize());
        let mut cursor = table.cursor();
        cursor.map_region(VirtAddr::from(0), same, address(PAGES), flags(), false).expect("nothing is there");
    });
    sink.note("range_map", MULTIARCH, 1, figure);
    let (figure, sum) = time(|| {
        let query = |page| table.query(VirtAddr::from(address(page))).expect("mapped").0.as_usize() >> 12;
        (0..PAGES).map(query).sum::<usize>()
    });
    assert_eq!(sum as u64, PAGES * (PAGES - 1) / 2);
    sink.note("range_query", MULTIARCH, 1, figure);
    let (figure, ()) = time(|| {
        table.cursor().unmap_region(VirtAddr::from(0), address(PAGES)).expect("mapped");
    });
    sink.note("unmap", MULTIARCH, 1, figure);
}

fn multiarch_map(table: &mut Multiarch, pages: impl Iterator<Item = u64>) {
    let flags = flags();
    let mut cursor = table.cursor();
    for page in pages {
        let (from, to) = (VirtAddr::from(address(page)), PhysAddr::from(address(page)));
        let size = page_table_multiarch::PageSize::Size4K;
        cursor.map(from, to, size, flags).expect("nothing is there");
    }
}

fn multiarch_cursor(world: &mut World, sink: &mut Sink) {
    use_arena(world);
    let mut table = Multiarch::try_new().expect("a root");
    sink.note("cursor_map", MULTIARCH, 1, time(|| multiarch_map(&mut table, 0..PAGES)).0);
}

fn multiarch_random(world: &mut World, sink: &mut Sink) {
    use_arena(world);
    let mut table = Multiarch::try_new().expect("a root");
    let (figure, ()) = time(|| multiarch_map(&mut table, world.random.iter().copied()));
    sink.note("random_map", MULTIARCH, 1, figure);
}

struct X86Arena<'a>(&'a Arena);

// SAFETY: the arena gives each frame out once.
unsafe impl X86Frames<Size4KiB> for X86Arena<'_> {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let frame = self.0.allocate()?;
        Some(PhysFrame::containing_address(x86_64::PhysAddr::new(frame.address().raw())))
    }
}

fn x86_table(arena: &Arena) -> OffsetPageTable<'_> {
    let root = arena.pointer(arena.allocate().expect("the arena has room")).cast::<X86Table>();
    // SAFETY: the frame was allocated just now, is of a table's size, and is all zero from here on, which is an empty
    // table; table frames have their own address as number, so the offset is zero.
    unsafe {
        root.cast::<u8>().write_bytes(0, 4096);
        OffsetPageTable::new(&mut *root.as_ptr(), x86_64::VirtAddr::new(0))
    }
}

fn x86_map(table: &mut OffsetPageTable<'_>, arena: &Arena, pages: impl Iterator<Item = u64>) {
    let flags = black_box(PageTableFlags::PRESENT | PageTableFlags::WRITABLE);
    for page in pages {
        let from = Page::<Size4KiB>::containing_address(x86_64::VirtAddr::new(page * PAGE));
        let to = PhysFrame::containing_address(x86_64::PhysAddr::new(page * PAGE));
        // SAFETY: no processor uses this table.
        let flush = unsafe { table.map_to(from, to, flags, &mut X86Arena(arena)) };
        flush.expect("nothing is there").ignore();
    }
}

fn x86(world: &mut World, sink: &mut Sink) {
    let mut table = x86_table(&world.arena);
    sink.note("range_map", X86, 1, time(|| x86_map(&mut table, &world.arena, 0..PAGES)).0);
    let (figure, sum) = time(|| {
        let query = |page: u64| {
            table.translate_addr(x86_64::VirtAddr::new(page * PAGE)).expect("mapped").as_u64() >> 12
        };
        (0..PAGES).map(query).sum::<u64>()
    });
    assert_eq!(sum, PAGES * (PAGES - 1) / 2);
    sink.note("range_query", X86, 1, figure);
    let (figure, ()) = time(|| {
        for page in 0..PAGES {
            let from = Page::<Size4KiB>::containing_address(x86_64::VirtAddr::new(page * PAGE));
            table.unmap(from).expect("mapped").1.ignore();
        }
    });
    sink.note("unmap", X86, 1, figure);
}

fn x86_random(world: &mut World, sink: &mut Sink) {
    let mut table = x86_table(&world.arena);
    let (figure, ()) = time(|| x86_map(&mut table, &world.arena, world.random.iter().copied()));
    sink.note("random_map", X86, 1, figure);
}

/// The identity between frames and pointers, for aarch64-paging.
struct Identity;

impl Translation<Stage2Attributes> for Identity {
    fn allocate_table(&mut self) -> (NonNull<PageTable<Stage2Attributes>>, PhysicalAddress) {
        let address = frame();
        let page: NonNull<PageTable<Stage2Attributes>> =
            NonNull::new(core::ptr::with_exposed_provenance_mut(address)).expect("not null");
        // SAFETY: the frame is 4 KiB that nobody else uses.
        unsafe { page.cast::<u8>().write_bytes(0, 4096) };
        (page, PhysicalAddress(address))
    }

    unsafe fn deallocate_table(&mut self, _: NonNull<PageTable<Stage2Attributes>>) {}

    fn physical_to_virtual(&self, address: PhysicalAddress) -> NonNull<PageTable<Stage2Attributes>> {
        NonNull::new(core::ptr::with_exposed_provenance_mut(address.0)).expect("not null")
    }
}

fn aarch64_map(table: &mut RootTable<Stage2, Identity>, first: u64, pages: u64) {
    let range = MemoryRegion::new(address(first), address(first + pages));
    let attributes = black_box(Stage2Attributes::VALID | Stage2Attributes::S2AP_ACCESS_RW);
    let constraints = Constraints::NO_BLOCK_MAPPINGS;
    table.map_range(&range, PhysicalAddress(address(first)), attributes, constraints).expect("in reach");
}

fn aarch64(world: &mut World, sink: &mut Sink) {
    use_arena(world);
    let mut table = RootTable::new(Identity, 0, Stage2);
    sink.note("range_map", AARCH64, 1, time(|| aarch64_map(&mut table, 0, PAGES)).0);
    let (figure, pages) = time(|| {
        let mut pages = 0;
        let mut count = |_: &MemoryRegion, descriptor: &_, _: usize| {
            let _: &aarch64_paging::descriptor::Descriptor<Stage2Attributes> = descriptor;
            pages += u64::from(descriptor.flags().contains(Stage2Attributes::VALID));
            Ok(())
        };
        table.walk_range(&MemoryRegion::new(0, address(PAGES)), &mut count).expect("in reach");
        pages
    });
    assert_eq!(pages, PAGES);
    sink.note("range_query", AARCH64, 1, figure);
}

fn aarch64_single(world: &mut World, sink: &mut Sink) {
    use_arena(world);
    let mut table = RootTable::new(Identity, 0, Stage2);
    let (figure, ()) = time(|| (0..PAGES).for_each(|page| aarch64_map(&mut table, page, 1)));
    sink.note("cursor_map", AARCH64, 1, figure);
}

fn aarch64_random(world: &mut World, sink: &mut Sink) {
    use_arena(world);
    let mut table = RootTable::new(Identity, 0, Stage2);
    let (figure, ()) = time(|| world.random.iter().for_each(|&page| aarch64_map(&mut table, page, 1)));
    sink.note("random_map", AARCH64, 1, figure);
}
