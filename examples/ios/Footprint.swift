// What this app holds, as iOS counts it when it decides to end an app.

import Foundation

#if os(iOS)
import os
#endif

/// Bytes. Clean pages of mapped files (the text model's weights) are in `mapped`, not in `footprint`.
struct Footprint {
    var footprint: UInt64
    var mapped: UInt64
    /// What the app may still allocate before it is ended; only iOS says.
    var left: UInt64?

    static func now() -> Footprint? {
        #if canImport(Darwin)
        var info = task_vm_info_data_t()
        let words = MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<integer_t>.size
        var count = mach_msg_type_number_t(words)
        let status = withUnsafeMutablePointer(to: &info) { pointer in
            pointer.withMemoryRebound(to: integer_t.self, capacity: words) {
                task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
            }
        }
        guard status == KERN_SUCCESS else { return nil }
        var found = Footprint(footprint: info.phys_footprint, mapped: info.external)
        #if os(iOS)
        found.left = UInt64(os_proc_available_memory())
        #endif
        return found
        #else
        return nil
        #endif
    }
}

extension Footprint: CustomStringConvertible {
    var description: String {
        func gigabytes(_ bytes: UInt64) -> String { String(format: "%.2f GB", Double(bytes) / 1e9) }
        let held = "\(gigabytes(footprint)) held, \(gigabytes(mapped)) mapped"
        return left.map { "\(held), \(gigabytes($0)) left" } ?? held
    }
}
