// A screenshot to the pixels the vision tower was trained on.
//
// Size and filter are those of autoglm_gguf/vision.py, which are transformers': stretched to multiples
// of 28, never padded (libmtmd's own resizing adds bars, which shifts every coordinate). The filter is
// Pillow's bicubic in its fixed-point form, bit for bit. Build with -O: unoptimised it takes seconds.

import Foundation

#if canImport(CoreGraphics)
import CoreGraphics
#endif

struct ImageLimits: Sendable {
    var patchSize = 14
    var mergeSize = 2
    /// Two frames of width times height, as transformers counts a still image.
    var minPixels = 12_544
    var maxPixels = 47_040_000

    /// Pixels per image token side.
    var factor: Int { patchSize * mergeSize }
}

/// RGB, 8 bits, row by row from the top left.
struct RGBImage: Sendable {
    let width: Int
    let height: Int
    let pixels: [UInt8]
}

struct ImageError: LocalizedError {
    let errorDescription: String?
}

/// Pixels at which an image is shown to the tower: multiples of `limits.factor` within its limits.
func fitSize(
    _ width: Int, _ height: Int, _ limits: ImageLimits, maxImageTokens: Int? = nil
) throws -> (width: Int, height: Int) {
    let factor = limits.factor, frames = 2
    var (width, height) = (width, height)
    guard width > 0, height > 0 else { throw ImageError(errorDescription: "image: empty") }
    let high = maxImageTokens.map { min(limits.maxPixels, $0 * factor * factor * frames) }
        ?? limits.maxPixels
    if min(width, height) < factor {
        let scale = Double(factor) / Double(min(width, height))
        (width, height) = (Int(Double(width) * scale), Int(Double(height) * scale))
    }
    guard max(width, height) <= 200 * min(width, height) else {
        throw ImageError(errorDescription: "image: aspect ratio over 200 (\(width)x\(height) px)")
    }
    func multiple(_ side: Int, _ scale: Double, _ rule: FloatingPointRoundingRule) -> Int {
        Int((Double(side) * scale / Double(factor)).rounded(rule)) * factor
    }
    let fitted = (
        width: multiple(width, 1, .toNearestOrEven), height: multiple(height, 1, .toNearestOrEven)
    )
    let area = Double(frames * width * height)
    if frames * fitted.width * fitted.height > high {
        let shrink = (area / Double(high)).squareRoot()
        let longest = maxImageTokens.map { $0 * factor } ?? .max
        func shrunk(_ side: Int) -> Int {
            let n = Int((Double(side) / shrink / Double(factor)).rounded(.down))
            return min(max(factor, n * factor), longest)
        }
        return (shrunk(width), shrunk(height))
    }
    if frames * fitted.width * fitted.height < limits.minPixels {
        let grow = (Double(limits.minPixels) / area).squareRoot()
        return (multiple(width, grow, .up), multiple(height, grow, .up))
    }
    return fitted
}

extension RGBImage {
    /// The image at the tower's size.
    func fitted(to limits: ImageLimits, maxImageTokens: Int? = nil) throws -> RGBImage {
        let size = try fitSize(width, height, limits, maxImageTokens: maxImageTokens)
        return resized(size.width, size.height)
    }

    /// Pillow's `resize((newWidth, newHeight), BICUBIC)`, and its order: columns first, unless the
    /// height loses more than twice what the width loses (since Pillow 13; before, always).
    func resized(_ newWidth: Int, _ newHeight: Int) -> RGBImage {
        let rowsFirst = height > newHeight && height - newHeight > 2 * (width - newWidth)
        return rowsFirst
            ? withHeight(newHeight).withWidth(newWidth) : withWidth(newWidth).withHeight(newHeight)
    }

    private func withWidth(_ new: Int) -> RGBImage {
        if new == width { return self }
        let out = filter(pixels, width, new, step: 3, lines: height, line: (width, new))
        return RGBImage(width: new, height: height, pixels: out)
    }

    private func withHeight(_ new: Int) -> RGBImage {
        if new == height { return self }
        let out = filter(pixels, height, new, step: width * 3, lines: width, line: (1, 1))
        return RGBImage(width: width, height: new, pixels: out)
    }
}

/// Filters one axis from `old` to `new` pixels. `step` bytes lie between neighbours on the axis; lines
/// begin `line.from` pixels apart in the source and `line.to` pixels apart in the result.
private func filter(
    _ source: [UInt8], _ old: Int, _ new: Int, step: Int, lines: Int, line: (from: Int, to: Int)
) -> [UInt8] {
    let bits = 22  // Pillow's PRECISION_BITS
    let scale = Double(old) / Double(new), stretch = max(scale, 1), shrink = 1 / stretch
    var out = [UInt8](repeating: 0, count: lines * new * 3)
    for index in 0..<new {
        let center = (Double(index) + 0.5) * scale
        let low = max(0, Int(center - 2 * stretch + 0.5))
        let high = min(old, Int(center + 2 * stretch + 0.5))
        let weights = (low..<high).map { bicubic((Double($0) - center + 0.5) * shrink) }
        let sum = weights.reduce(0, +)
        let taps = weights.map { weight in
            let fixed = weight / sum * Double(1 << bits)
            return Int(fixed < 0 ? fixed - 0.5 : fixed + 0.5)
        }
        for number in 0..<lines {
            for channel in 0..<3 {
                var total = 1 << (bits - 1), from = number * line.from * 3 + low * step + channel
                for tap in taps {
                    total += Int(source[from]) * tap
                    from += step
                }
                out[number * line.to * 3 + index * step + channel] = UInt8(clamping: total >> bits)
            }
        }
    }
    return out
}

private func bicubic(_ distance: Double) -> Double {
    let a = -0.5, x = abs(distance)
    if x < 1 { return ((a + 2) * x - (a + 3)) * x * x + 1 }
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0
}

#if canImport(CoreGraphics)
extension RGBImage {
    /// The picture's own numbers: iPhone screenshots are Display P3, and the reference reads them
    /// without converting, so they are drawn in the colour space they came in. Transparent is white.
    init(_ image: CGImage) throws {
        let own = image.colorSpace.flatMap { $0.model == .rgb && $0.supportsOutput ? $0 : nil }
        guard let space = own ?? CGColorSpace(name: CGColorSpace.sRGB),
            let context = CGContext(
                data: nil, width: image.width, height: image.height, bitsPerComponent: 8,
                bytesPerRow: image.width * 4, space: space,
                bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)
        else { throw ImageError(errorDescription: "image: its pixels cannot be read") }
        let frame = CGRect(x: 0, y: 0, width: image.width, height: image.height)
        context.setFillColor(gray: 1, alpha: 1)
        context.fill(frame)
        context.interpolationQuality = .none
        context.draw(image, in: frame)
        guard let data = context.data else {
            throw ImageError(errorDescription: "image: its pixels cannot be read")
        }
        let source = data.assumingMemoryBound(to: UInt8.self)
        let count = image.width * image.height
        let pixels = [UInt8](unsafeUninitializedCapacity: count * 3) { out, filled in
            for index in 0..<count {
                for channel in 0..<3 { out[index * 3 + channel] = source[index * 4 + channel] }
            }
            filled = count * 3
        }
        self.init(width: image.width, height: image.height, pixels: pixels)
    }
}
#endif
