//! Regions from a `vm_memory::GuestMemoryMmap` (feature `vm-memory`).

use premap_address::{Gpa, GpaRange, Hva, PageSize, RangeError};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, bitmap::Bitmap};

use crate::memory::{Backing, Region, Touch};

/// Why a region of vm-memory can't be mapped ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VmMemoryError {
    /// The region does not start or end on a page.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The region's hugetlb pages are of a size that premap does not know.
    #[error("the region at gpa {gpa} has hugetlb pages of {bytes} bytes; 2 MiB and 1 GiB are known")]
    PageSize {
        /// Where the region starts.
        gpa: Gpa,
        /// The size of its pages.
        bytes: u64,
    },
}

/// Describes every region of `memory` in the order of its addresses, all to be touched the same way.
///
/// # Errors
/// A region that is not made of whole pages, or of hugetlb pages of an unknown size.
pub fn regions<B: Bitmap>(memory: &GuestMemoryMmap<B>, touch: Touch) -> Result<Vec<Region>, VmMemoryError> {
    memory
        .iter()
        .map(|region| {
            let gpa = Gpa::new(region.start_addr().0);
            let range = GpaRange::try_new(gpa, region.len())?;
            let host = Hva::new(region.as_ptr().expose_provenance() as u64);
            Ok(Region { range, host, backing: backing(region, gpa)?, touch })
        })
        .collect()
}

fn backing<B: Bitmap>(region: &GuestRegionMmap<B>, gpa: Gpa) -> Result<Backing, VmMemoryError> {
    let flags = region.flags();
    let file = region.file_offset().map(vm_memory::FileOffset::file);
    let hugetlb = flags & libc::MAP_HUGETLB != 0 || GuestMemoryRegion::is_hugetlbfs(region) == Some(true);
    if hugetlb {
        // A file on hugetlbfs says its page size itself; anonymous memory says it in the flags, or means the default.
        let from_file =
            file.and_then(|file| rustix::fs::fstatfs(file).ok()).map(|stat| stat.f_bsize.cast_unsigned());
        let shift = flags.cast_unsigned() >> libc::MAP_HUGE_SHIFT & 0x3f;
        let bytes = from_file.unwrap_or(if shift == 0 { PageSize::Size2M.bytes() } else { 1 << shift });
        let size = PageSize::ALL.into_iter().skip(1).find(|size| size.bytes() == bytes);
        return size.map(Backing::Hugetlb).ok_or(VmMemoryError::PageSize { gpa, bytes });
    }
    Ok(match (flags & libc::MAP_SHARED != 0, file.is_some()) {
        (true, _) => Backing::Shared,
        (false, true) => Backing::PrivateFile,
        (false, false) => Backing::Anonymous,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{FileOffset, GuestAddress, GuestRegionCollection, mmap::MmapRegionBuilder};

    const BYTES: usize = 4 << 20;

    fn memory(gpa: u64, flags: i32, file: Option<std::fs::File>) -> GuestRegionMmap<()> {
        let builder = MmapRegionBuilder::<()>::new(BYTES)
            .with_mmap_flags(flags)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        let builder = match file {
            Some(file) => builder.with_file_offset(FileOffset::new(file, 0)),
            None => builder,
        };
        GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(gpa)).unwrap()
    }

    fn file() -> std::fs::File {
        let fd = rustix::fs::memfd_create("vm-memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, BYTES as u64).unwrap();
        fd.into()
    }

    #[test]
    fn regions_carry_address_length_and_backing() {
        let private = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let all = GuestRegionCollection::from_regions(vec![
            memory(0, private | libc::MAP_ANONYMOUS, None),
            memory(1 << 30, libc::MAP_SHARED, Some(file())),
            memory(4 << 30, private, Some(file())),
        ])
        .unwrap();
        let regions = regions(&all, Touch::Write).unwrap();
        let told: Vec<_> =
            regions.iter().map(|region| (region.range.start().raw(), region.backing)).collect();
        let expected = [(0, Backing::Anonymous), (1 << 30, Backing::Shared), (4 << 30, Backing::PrivateFile)];
        assert_eq!(told, expected);
        assert!(regions.iter().all(|region| region.range.bytes() == BYTES as u64));
        let plan = crate::Plan::new(regions).unwrap();
        let none: &mut [premap_kvm::linux::Vcpu<std::os::fd::OwnedFd>] = &mut [];
        let report = crate::Engine::new().stages(crate::Stages::Host).run(&plan, none).unwrap();
        assert_eq!(report.host.mapped, 3 * BYTES as u64);
    }
}
