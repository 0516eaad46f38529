// Runs the app's sources without the app: prompts, sizes, pixels and answers against those of Python.
//
//     check CASES.json TEXT.gguf MMPROJ.gguf        (examples/ios/check.sh makes all three)

import Foundation

struct Cases: Decodable {
    struct Prompt: Decodable { let task: String, hasImage: Bool, segments: [String] }
    struct Size: Decodable { let from: [Int], maxPixels: Int, maxImageTokens: Int?, to: [Int]? }
    struct Pixels: Decodable { let from: [Int], to: [Int], sum: UInt64 }
    struct Answer: Decodable { let task: String, image: [Int]?, text: String }
    let prompts: [Prompt], sizes: [Size], pixels: [Pixels], answers: [Answer]
}

/// The picture that check/cases.py makes too.
func pattern(_ size: [Int]) -> RGBImage {
    var pixels: [UInt8] = []
    for y in 0..<size[1] {
        for x in 0..<size[0] {
            pixels += [x * 7 + y, y * 3 + x * x, x * y / 7].map { UInt8($0 & 255) }
        }
    }
    return RGBImage(width: size[0], height: size[1], pixels: pixels)
}

/// FNV-1a, 64 bits.
func sum(_ bytes: [UInt8]) -> UInt64 {
    bytes.reduce(0xcbf2_9ce4_8422_2325) { ($0 ^ UInt64($1)) &* 0x100_0000_01b3 }
}

var failed = 0
func check(_ isRight: Bool, _ what: @autoclosure () -> String) {
    if !isRight {
        failed += 1
        print("WRONG \(what())")
    }
}

let paths = CommandLine.arguments
let cases = try JSONDecoder().decode(Cases.self, from: Data(contentsOf: URL(fileURLWithPath: paths[1])))
for known in cases.prompts {
    let image = known.hasImage ? pattern([28, 28]) : nil
    let found = renderPrompt([
        Message(role: .system, text: systemPrompt(for: known.task)),
        Message(role: .user, text: known.task, image: image),
    ])
    check(found == known.segments, "prompt \(found)")
}
for known in cases.sizes {
    let limits = ImageLimits(maxPixels: known.maxPixels)
    let found = try? fitSize(
        known.from[0], known.from[1], limits, maxImageTokens: known.maxImageTokens)
    check(found.map { [$0.width, $0.height] } == known.to, "size \(known) \(found as Any)")
}
for known in cases.pixels {
    let found = pattern(known.from).resized(known.to[0], known.to[1])
    check(sum(found.pixels) == known.sum, "pixels \(known.from) to \(known.to)")
}
let options = PhoneModel.Options(gpuLayers: 0, maxImageTokens: 200, threads: 2)
let model = try PhoneModel(
    text: URL(fileURLWithPath: paths[2]), mmproj: URL(fileURLWithPath: paths[3]), options: options)
for known in cases.answers {
    let message = Message(role: .user, text: known.task, image: known.image.map(pattern))
    var found = ""
    for try await text in model.answer([message], maxTokens: 48) { found += text }
    check(found == known.text, "answer \(found) instead of \(known.text)")
}
// A stream that is left early leaves the model usable.
for try await _ in model.answer([Message(role: .user, text: cases.answers[0].task)]) { break }
var again = ""
for try await text in model.answer([Message(role: .user, text: cases.answers[0].task)], maxTokens: 48) {
    again += text
}
check(again == cases.answers[0].text, "answer after a cancel \(again)")
print("\(failed) wrong; held: \(Footprint.now()?.description ?? "not told by this system")")
exit(failed == 0 ? 0 : 1)
